"""ChronoEdit. Its pipeline drops to two frames in the middle of the loop, so the grid changes between steps."""

from __future__ import annotations

from .family import NORMED, Family, patchified_grid
from .spread import JOINED, VIDEO, tables
from .wan import WanVSAProcessor

FAMILY = Family(
    name="ChronoEdit",
    transformers=("ChronoEditTransformer3DModel",),
    modules=r"blocks\.\d+\.attn1",
    processor=WanVSAProcessor,
    read_grid=patchified_grid,
    needs=(*NORMED, "fused_projections"),
    checkpoints=("nvidia/ChronoEdit-14B-Diffusers",),
    plan={"rope": tables(1, 4), "blocks.0": VIDEO, "proj_out": JOINED},
    stock_ring=True,
)
