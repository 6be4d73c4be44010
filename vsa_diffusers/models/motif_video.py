"""Motif-Video: dual-stream and single-stream encoder blocks, and decoder blocks that see the encoder's video."""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers.models.transformers import transformer_motif_video

from .family import Family, Grid
from .joint import JOINT, JointVSAProcessor, square_patch_grid, text_of_key_mask
from .spread import JOINED, VIDEO, tables


class MotifVideoVSAProcessor(JointVSAProcessor):
    """Stands in for `MotifVideoAttnProcessor2_0` in a block whose place in the model is unknown."""

    stock = transformer_motif_video.MotifVideoAttnProcessor2_0
    text_mask = staticmethod(text_of_key_mask)

    def is_decoder(self, shape: tuple[int, ...], text: tuple[int, int], text_mask: torch.Tensor | None) -> bool:
        """Whether the second stream is the encoder's video: it is as long as the video, and has no mask."""
        return text == (0, math.prod(shape)) and text_mask is None

    def attend(
        self,
        attn: torch.nn.Module,
        shape: tuple[int, ...],
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        hidden: torch.Tensor,
        text: tuple[int, int] = (0, 0),
        text_mask: torch.Tensor | None = None,
        videos: int = 1,
    ) -> torch.Tensor:
        """As everywhere, but the two videos of a decoder block have the same grid.

        Together they make one of twice as many frames. The gate serves the first half.
        """
        if self.is_decoder(shape, text, text_mask):
            shape, text, videos = twice_as_long(shape) if shape else shape, (0, 0), 2
        return super().attend(attn, shape, query, key, value, hidden, text, text_mask, videos)


class MotifVideoEncoderVSAProcessor(MotifVideoVSAProcessor):
    """Stands in for it in the encoder blocks, whose second stream is text and image tokens."""

    def is_decoder(self, shape, text, text_mask) -> bool:
        """Not, whatever the length of the text."""
        return False


class MotifVideoDecoderVSAProcessor(MotifVideoVSAProcessor):
    """Stands in for it in the decoder blocks, whose second stream is the encoder's video."""

    @staticmethod
    def tiled_grid(grid: Grid) -> Grid:
        """Both videos, one after the other."""
        return twice_as_long(grid)

    def is_decoder(self, shape, text, text_mask) -> bool:
        """By its place."""
        return True


def twice_as_long(grid: tuple[int, ...]) -> Grid:
    """The grid of a video and its like after it."""
    t, h, w = grid
    return 2 * t, h, w


def processor_at(transformer: torch.nn.Module, name: str) -> type[MotifVideoVSAProcessor]:
    """The last `num_decoder_layers` of the single-stream blocks are the decoder."""
    stack, position, _ = name.split(".")
    first = len(transformer.single_transformer_blocks) - transformer.config.num_decoder_layers
    is_decoder = stack == "single_transformer_blocks" and int(position) >= first
    return MotifVideoDecoderVSAProcessor if is_decoder else MotifVideoEncoderVSAProcessor


def plan(transformer: torch.nn.Module) -> dict[str, Any]:
    """The decoder begins with a whole copy of the video, beside the encoder's part."""
    spread: dict[str, Any] = {"rope": tables(0, 2), "transformer_blocks.0": VIDEO, "proj_out": JOINED}
    decoder = transformer.config.num_decoder_layers
    if decoder:
        spread[f"single_transformer_blocks.{len(transformer.single_transformer_blocks) - decoder}"] = VIDEO
    return spread


FAMILY = Family(
    name="Motif-Video",
    transformers=("MotifVideoTransformer3DModel",),
    modules=r"(single_)?transformer_blocks\.\d+\.attn",
    processor=MotifVideoVSAProcessor,
    plan=plan,
    processor_at=processor_at,
    read_grid=square_patch_grid,
    needs=JOINT,
    checkpoints=("Motif-Technologies/Motif-Video-2B",),
    stays_dense="cross-attention; text and image tokens attend densely",
)
