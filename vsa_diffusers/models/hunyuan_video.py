"""HunyuanVideo and its image-to-video forms."""

from __future__ import annotations

from diffusers.models.transformers import transformer_hunyuan_video

from .family import Family
from .joint import JOINT, JointVSAProcessor, square_patch_grid, text_of_key_mask


class HunyuanVideoVSAProcessor(JointVSAProcessor):
    """Stands in for `HunyuanVideoAttnProcessor2_0` in dual-stream and single-stream blocks."""

    stock = transformer_hunyuan_video.HunyuanVideoAttnProcessor2_0
    text_mask = staticmethod(text_of_key_mask)


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
)
