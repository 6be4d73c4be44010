"""HunyuanVideo and its image-to-video forms."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.transformers import transformer_hunyuan_video

from ..parallel import Exchange
from .family import Family
from .joint import JOINT, JointVSAProcessor, square_patch_grid, text_of_key_mask
from .spread import before, joint


class HunyuanVideoVSAProcessor(JointVSAProcessor):
    """Stands in for `HunyuanVideoAttnProcessor2_0` in dual-stream and single-stream blocks."""

    stock = transformer_hunyuan_video.HunyuanVideoAttnProcessor2_0
    text_mask = staticmethod(text_of_key_mask)


def parallel_hooks(transformer: torch.nn.Module, exchange: Exchange) -> list[Any]:
    """A given first frame has a modulation of its own, in the blocks' first tokens: those of it that a rank has."""
    if transformer.config.image_condition_type != "token_replace":
        return []

    def of_this_rank(count: int, given: dict[str, Any]) -> int:
        sizes = exchange.sizes((given.get("freqs_cis") or given["image_rotary_emb"])[0].shape[0])
        return min(max(count - exchange.start(sizes), 0), sizes[exchange.rank])

    return [
        handle
        for blocks in (transformer.transformer_blocks, transformer.single_transformer_blocks)
        for handle in before(blocks, {"num_tokens": of_this_rank})
    ]


FAMILY = Family(
    name="HunyuanVideo",
    transformers=("HunyuanVideoTransformer3DModel",),
    modules=r"(single_)?transformer_blocks\.\d+\.attn",
    processor=HunyuanVideoVSAProcessor,
    read_grid=square_patch_grid,
    needs=JOINT,
    checkpoints=(
        "hunyuanvideo-community/HunyuanVideo",
        "hunyuanvideo-community/HunyuanVideo-I2V",
        "Skywork/SkyReels-V1-Hunyuan-I2V",
    ),
    stays_dense="token refiner; text attends densely",
    plan=joint("rope", (0, 2)),
    parallel_hooks=parallel_hooks,
)
