"""EasyAnimate 5.1: text-, image- and control-to-video."""

from __future__ import annotations

from diffusers.models.transformers import transformer_easyanimate

from .family import Family
from .joint import JOINT, JointVSAProcessor, square_patch_grid
from .spread import joint


class EasyAnimateVSAProcessor(JointVSAProcessor):
    """Stands in for `EasyAnimateAttnProcessor2_0`."""

    text_first = True
    stock = transformer_easyanimate.EasyAnimateAttnProcessor2_0


FAMILY = Family(
    name="EasyAnimate",
    transformers=("EasyAnimateTransformer3DModel",),
    modules=r"transformer_blocks\.\d+\.attn1",
    processor=EasyAnimateVSAProcessor,
    read_grid=square_patch_grid,
    needs=JOINT,
    checkpoints=(
        "alibaba-pai/EasyAnimateV5.1-7b-zh-diffusers",
        "alibaba-pai/EasyAnimateV5.1-12b-zh-InP-diffusers",
        "alibaba-pai/EasyAnimateV5.1-12b-zh-Control-diffusers",
    ),
    stays_dense="text attends densely",
    plan=joint("rope_embedding", (0, 2)),
)
