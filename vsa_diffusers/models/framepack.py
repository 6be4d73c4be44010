"""HunyuanVideo Framepack: history tokens come before the video tokens, image and text tokens after them."""

from __future__ import annotations

from .family import Family
from .hunyuan_video import HunyuanVideoVSAProcessor
from .joint import JOINT, square_patch_grid


class FramepackVSAProcessor(HunyuanVideoVSAProcessor):
    """Stands in for `HunyuanVideoAttnProcessor2_0`, with history in the video stream."""

    surplus = "before"


FAMILY = Family(
    name="HunyuanVideo Framepack",
    transformers=("HunyuanVideoFramepackTransformer3DModel",),
    modules=r"(single_)?transformer_blocks\.\d+\.attn",
    processor=FramepackVSAProcessor,
    read_grid=square_patch_grid,
    needs=JOINT,
    checkpoints=("lllyasviel/FramePackI2V_HY",),
    stays_dense="token refiner; text, image and history tokens attend densely",
)
