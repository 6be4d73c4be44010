"""SkyReels-V2. Its causal mode (`num_frame_per_block` above 1) masks self-attention, and such calls run dense."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models._modeling_parallel import ContextParallelInput

from .family import NORMED, Family, patchified_grid
from .spread import JOINED, VIDEO, tables
from .wan import WanVSAProcessor


def plan(transformer: torch.nn.Module) -> dict[str, Any]:
    """Diffusion forcing has a noise level for every token, and the last ones' are whole."""
    levels = {"temb": ContextParallelInput(split_dim=2, expected_dims=4)}
    last = f"blocks.{len(transformer.blocks) - 1}"
    return {"rope": tables(1, 4), "blocks.0": VIDEO, "blocks.*": levels, last: JOINED}


FAMILY = Family(
    name="SkyReels-V2",
    transformers=("SkyReelsV2Transformer3DModel",),
    modules=r"blocks\.\d+\.attn1",
    processor=WanVSAProcessor,
    read_grid=patchified_grid,
    needs=(*NORMED, "fused_projections"),
    checkpoints=(
        "Skywork/SkyReels-V2-T2V-14B-540P-Diffusers",
        "Skywork/SkyReels-V2-T2V-14B-720P-Diffusers",
        "Skywork/SkyReels-V2-I2V-1.3B-540P-Diffusers",
        "Skywork/SkyReels-V2-I2V-14B-540P-Diffusers",
        "Skywork/SkyReels-V2-I2V-14B-720P-Diffusers",
        "Skywork/SkyReels-V2-DF-1.3B-540P-Diffusers",
        "Skywork/SkyReels-V2-DF-14B-540P-Diffusers",
        "Skywork/SkyReels-V2-DF-14B-720P-Diffusers",
    ),
    stays_dense="cross-attention; self-attention in the causal mode, which masks it (`num_frame_per_block` above 1)",
    plan=plan,
)
