"""HunyuanVideo and its image-to-video forms."""

from __future__ import annotations

import torch
from diffusers.models.transformers import transformer_hunyuan_video

from .family import Family
from .joint import JointVSAProcessor, square_patch_grid


class HunyuanVideoVSAProcessor(JointVSAProcessor):
    """Stands in for `HunyuanVideoAttnProcessor2_0` in dual-stream and single-stream blocks."""

    stock = transformer_hunyuan_video.HunyuanVideoAttnProcessor2_0

    def split_mask(
        self, attention_mask: torch.Tensor | None, length: int
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The model masks padded text keys, `[batch, 1, 1, sequence]`."""
        return None, None if attention_mask is None else attention_mask[:, 0, 0, -length:]


FAMILY = Family(
    name="HunyuanVideo",
    transformers=("HunyuanVideoTransformer3DModel",),
    modules=r"(single_)?transformer_blocks\.\d+\.attn",
    processor=HunyuanVideoVSAProcessor,
    read_grid=square_patch_grid,
)
