"""HunyuanVideo 1.5."""

from __future__ import annotations

import torch
from diffusers.models.transformers import transformer_hunyuan_video15

from .family import Family
from .joint import JointVSAProcessor, square_patch_grid


class HunyuanVideo15VSAProcessor(JointVSAProcessor):
    """Stands in for `HunyuanVideo15AttnProcessor2_0`."""

    stock = transformer_hunyuan_video15.HunyuanVideo15AttnProcessor2_0

    def split_mask(
        self, attention_mask: torch.Tensor | None, length: int
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The model passes the text's own mask; its processor also masks padded text queries, which nobody reads."""
        return None, None if attention_mask is None else attention_mask.bool()


FAMILY = Family(
    name="HunyuanVideo 1.5",
    transformers=("HunyuanVideo15Transformer3DModel",),
    modules=r"transformer_blocks\.\d+\.attn",
    processor=HunyuanVideo15VSAProcessor,
    read_grid=square_patch_grid,
)
