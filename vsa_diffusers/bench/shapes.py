"""The attention layers that are measured, and how a user names one of their own."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Shape:
    """One attention layer of a video model."""

    name: str
    batch: int
    heads: int
    video_shape: tuple[int, int, int]
    head_dim: int

    @property
    def tokens(self) -> int:
        return math.prod(self.video_shape)

    @property
    def dense_flops(self) -> int:
        return 4 * self.batch * self.heads * self.head_dim * self.tokens**2

    def inputs(self, device: str, dtype: torch.dtype, backward: bool = False) -> list[torch.Tensor]:
        """Query, key, value and gate, `[B, S, H, D]`, random."""
        import torch

        size = (self.batch, self.tokens, self.heads, self.head_dim)
        return [torch.randn(size, device=device, dtype=dtype, requires_grad=backward) for _ in range(4)]


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("ltx2-512p", 1, 32, (16, 16, 24), 128),  # 512 x 768, 121 frames
        Shape("ltx2-1080p", 1, 32, (16, 34, 60), 128),  # 1088 x 1920, 121 frames
        Shape("wan1.3b-480p", 1, 12, (21, 30, 52), 128),  # 480 x 832, 81 frames
        Shape("wan5b-720p", 1, 24, (31, 22, 40), 128),  # 704 x 1280, 121 frames
        Shape("wan14b-720p", 1, 40, (21, 45, 80), 128),  # 720 x 1280, 81 frames
        Shape("hunyuan-720p", 1, 24, (33, 45, 80), 128),  # 720 x 1280, 129 frames
        Shape("cogvideox-480p", 2, 48, (13, 30, 45), 64),  # 480 x 720, 49 frames, guidance in one batch
    )
}
CPU_SHAPE = Shape("cpu", 1, 2, (16, 16, 16), 64)  # 4 096 tokens in 64 tiles


def parse(text: str) -> Shape:
    """A name from `SHAPES`, or `BxHxTxHxWxD`: batch, heads, video shape, head_dim."""
    if text in SHAPES:
        return SHAPES[text]
    try:
        batch, heads, *video_shape, head_dim = (int(part) for part in text.split("x"))
        T, H, W = video_shape
    except ValueError:
        names = ", ".join(SHAPES)
        raise ValueError(
            f"shape {text!r} is neither one of {names} nor batch x heads x T x H x W x head_dim, such as "
            "1x12x21x30x52x128."
        ) from None
    return Shape(text, batch, heads, (T, H, W), head_dim)
