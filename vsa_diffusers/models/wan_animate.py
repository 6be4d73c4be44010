"""Wan Animate. The reference image is the first frame of the grid."""

from __future__ import annotations

from typing import Any

import torch

from ..parallel import Exchange
from .family import NORMED, Family, patchified_grid
from .spread import JOINED, VIDEO, before, tables
from .wan import WanVSAProcessor


def parallel_hooks(transformer: torch.nn.Module, exchange: Exchange) -> list[Any]:
    """The face adapter attends frame by frame, and ranks have parts of frames."""

    def own(module: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return exchange.own(output, 1)

    whole = before(transformer.face_adapter, {"hidden_states": lambda tokens, given: exchange.gather(tokens, 1)})
    return whole + [adapter.register_forward_hook(own) for adapter in transformer.face_adapter]


FAMILY = Family(
    name="Wan Animate",
    transformers=("WanAnimateTransformer3DModel",),
    modules=r"blocks\.\d+\.attn1",
    processor=WanVSAProcessor,
    read_grid=patchified_grid,
    needs=(*NORMED, "fused_projections"),
    checkpoints=("Wan-AI/Wan2.2-Animate-14B-Diffusers",),
    stays_dense="cross-attention, face adapter",
    plan={"rope": tables(1, 4), "blocks.0": VIDEO, "proj_out": JOINED},
    parallel_hooks=parallel_hooks,
)
