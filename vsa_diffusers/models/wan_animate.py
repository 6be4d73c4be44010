"""Wan Animate. The reference image is the first frame of the grid."""

from __future__ import annotations

from .family import NORMED, Family, patchified_grid
from .wan import WanVSAProcessor

FAMILY = Family(
    name="Wan Animate",
    transformers=("WanAnimateTransformer3DModel",),
    modules=r"blocks\.\d+\.attn1",
    processor=WanVSAProcessor,
    read_grid=patchified_grid,
    needs=(*NORMED, "fused_projections"),
    checkpoints=("Wan-AI/Wan2.2-Animate-14B-Diffusers",),
    stays_dense="cross-attention, face adapter",
)
