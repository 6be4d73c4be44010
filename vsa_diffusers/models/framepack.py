"""HunyuanVideo Framepack: history tokens come before the video tokens, image and text tokens after them."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models._modeling_parallel import ContextParallelInput

from ..parallel import Exchange
from .family import Family
from .hunyuan_video import HunyuanVideoVSAProcessor
from .joint import JOINT, square_patch_grid
from .spread import VIDEO, join_first_output


class FramepackVSAProcessor(HunyuanVideoVSAProcessor):
    """Stands in for `HunyuanVideoAttnProcessor2_0`, with history in the video stream."""

    surplus = "before"


TABLES = [ContextParallelInput(split_dim=0, expected_dims=2)] * 2
"""Cosines and sines of history and video."""


def parallel_hooks(transformer: torch.nn.Module, exchange: Exchange) -> list[Any]:
    """The video's part is cut out of history and video before the last projection."""
    return join_first_output(transformer.single_transformer_blocks[-1], exchange)


FAMILY = Family(
    name="HunyuanVideo Framepack",
    transformers=("HunyuanVideoFramepackTransformer3DModel",),
    modules=r"(single_)?transformer_blocks\.\d+\.attn",
    processor=FramepackVSAProcessor,
    read_grid=square_patch_grid,
    needs=JOINT,
    checkpoints=("lllyasviel/FramePackI2V_HY",),
    stays_dense="token refiner; text, image and history tokens attend densely",
    plan={
        "transformer_blocks.0": VIDEO,
        "transformer_blocks.*": {"freqs_cis": TABLES},
        "single_transformer_blocks.*": {"image_rotary_emb": TABLES},
    },
    parallel_hooks=parallel_hooks,
)
