"""HunyuanVideo 1.5."""

from __future__ import annotations

from diffusers.models.transformers import transformer_hunyuan_video15

from .family import Family
from .joint import JOINT, JointVSAProcessor, square_patch_grid, text_of_text_mask
from .spread import joint


class HunyuanVideo15VSAProcessor(JointVSAProcessor):
    """Stands in for `HunyuanVideo15AttnProcessor2_0`."""

    stock = transformer_hunyuan_video15.HunyuanVideo15AttnProcessor2_0
    # The processor that this one stands in for also masks padded text queries, which nobody reads.
    text_mask = staticmethod(text_of_text_mask)


FAMILY = Family(
    name="HunyuanVideo 1.5",
    transformers=("HunyuanVideo15Transformer3DModel",),
    modules=r"transformer_blocks\.\d+\.attn",
    processor=HunyuanVideo15VSAProcessor,
    read_grid=square_patch_grid,
    needs=JOINT,
    checkpoints=(
        "hunyuanvideo-community/HunyuanVideo-1.5-480p_t2v",
        "hunyuanvideo-community/HunyuanVideo-1.5-480p_i2v",
    ),
    stays_dense="token refiner; text and image tokens attend densely",
    plan=joint("rope", (0, 2)),
)
