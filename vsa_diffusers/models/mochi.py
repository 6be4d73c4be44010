"""Mochi."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models import attention_processor

from .family import Family
from .joint import JOINT, JointVSAProcessor, square_patch_grid, text_of_text_mask
from .spread import joint


class MochiVSAProcessor(JointVSAProcessor):
    """Stands in for `MochiAttnProcessor2_0`, which leaves padded text out, one batch item at a time."""

    stock = attention_processor.MochiAttnProcessor2_0
    text_mask = staticmethod(text_of_text_mask)

    def rotate(self, x: torch.Tensor, rotary: Any) -> torch.Tensor:
        """Rotate neighbouring pairs by learned angles, `[sequence, heads, head_dim / 2]`."""
        cos, sin = rotary
        real, imaginary = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], -1).flatten(-2).type_as(x)


FAMILY = Family(
    name="Mochi",
    transformers=("MochiTransformer3DModel",),
    modules=r"transformer_blocks\.\d+\.attn1",
    processor=MochiVSAProcessor,
    read_grid=square_patch_grid,
    needs=JOINT,
    checkpoints=("genmo/mochi-1-preview",),
    stays_dense="text attends densely",
    plan=joint("rope", (0, 3)),
)
