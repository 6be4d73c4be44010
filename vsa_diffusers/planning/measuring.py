"""One attention layer of exactly the planned shape, timed on this machine."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..bench import subjects
from ..bench.measure import measure
from ..bench.shapes import Shape
from ..tiles import TileGrid
from .costs import Costs

CPU_HEADS = 1  # more take in proportion longer
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Timed:
    """What was timed.

    Args:
        device: its name.
        dense_ms: of the fastest dense attention that runs there.
        sparse_ms: by ratio.
        heads: that were timed; times are scaled from these to all.
    """

    device: str
    dense_ms: float
    sparse_ms: dict[float, float]
    heads: int


def time_layer(
    costs: Costs, batch: int, grid: TileGrid, combine: str, ratios: Sequence[float], progress: Progress
) -> Timed:
    """Time dense and sparse attention on random inputs: on a GPU in bf16, on the CPU a single head in fp32.

    Args:
        progress: called with what is about to be timed.

    Raises:
        ValueError: no dense attention runs here.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    heads = costs.heads if device == "cuda" else min(CPU_HEADS, costs.heads)
    shape = Shape("planned", batch if device == "cuda" else 1, heads, grid.video_shape, costs.head_dim)
    scale = costs.heads * batch / (heads * shape.batch)
    inputs = shape.inputs(device, torch.bfloat16 if device == "cuda" else torch.float32)
    dense = []
    with torch.no_grad():
        for name, call in subjects.dense(inputs, device):
            progress(name)
            try:
                dense.append(measure(call, device).ms)
            except RuntimeError:  # a backend that this GPU lacks
                continue
        if not dense:
            raise ValueError("--measure: no dense attention of PyTorch runs here, so there is nothing to compare with.")
        sparse = {}
        selection = "quarters" if combine == "merge" else "mean"
        implementation = "auto" if device == "cuda" else "torch"
        for ratio in ratios:
            progress(f"ratio {ratio:g}")
            call = subjects.ours(inputs, shape, ratio, combine, implementation, grid.block_size, selection)
            sparse[ratio] = measure(functools.partial(call), device).ms * scale
    name = torch.cuda.get_device_name(0) if device == "cuda" else f"this CPU ({torch.get_num_threads()} of its threads)"
    return Timed(name, min(dense) * scale, sparse, heads)
