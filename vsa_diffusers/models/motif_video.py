"""Motif-Video: dual-stream and single-stream encoder blocks, and decoder blocks that see the encoder's video."""

from __future__ import annotations

import math

import torch
from diffusers.models.transformers import transformer_motif_video

from .family import Family
from .joint import JointVSAProcessor, square_patch_grid, text_of_key_mask


class MotifVideoVSAProcessor(JointVSAProcessor):
    """Stands in for `MotifVideoAttnProcessor2_0`."""

    stock = transformer_motif_video.MotifVideoAttnProcessor2_0
    text_mask = staticmethod(text_of_key_mask)

    def attend(
        self,
        attn: torch.nn.Module,
        shape: tuple[int, int, int],
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        hidden: torch.Tensor,
        text: tuple[int, int] = (0, 0),
        text_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As everywhere, but a second stream as long as the video is the encoder's video, in the decoder blocks.

        Both have the same grid, so together they make one of twice as many frames. The gate serves the first half.
        """
        if text == (0, math.prod(shape)) and text_mask is None:
            t, h, w = shape
            shape, text = (2 * t, h, w), (0, 0)
        return super().attend(attn, shape, query, key, value, hidden, text, text_mask)


FAMILY = Family(
    name="Motif-Video",
    transformers=("MotifVideoTransformer3DModel",),
    modules=r"(single_)?transformer_blocks\.\d+\.attn",
    processor=MotifVideoVSAProcessor,
    read_grid=square_patch_grid,
    checkpoints=("Motif-Technologies/Motif-Video-2B",),
    stays_dense="cross-attention; text and image tokens attend densely",
)
