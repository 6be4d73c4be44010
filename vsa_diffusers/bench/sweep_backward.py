"""Try launches of the two large backward kernels, one kernel at a time, for the tuning table."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from ..problem import Problem
from ..tiles import TileGrid, num_selected_tiles
from .measure import time_ms
from .shapes import Shape


def candidates(table: Any, head_dim: int) -> Iterator[tuple[str, Any]]:
    """The table's own launch, then it with another launch for one of its kernels, and the name of that kernel."""
    from ..kernels.plans import Launch
    from ..kernels.support import HAS_DESCRIPTORS
    from ..kernels.tuning import LAYOUTS

    layouts = LAYOUTS[::-1] if HAS_DESCRIPTORS else LAYOUTS[1::-1]
    # warps, stages, keys, registers
    forms: dict[str, list[tuple[int, int, int, int | None]]] = {
        "query": [(4, 3, 32, None), (4, 4, 32, None), (4, 2, 32, 168), (4, 2, 64, None)],
        "key": [(4, 2, 32, None), (4, 3, 32, None), (4, 4, 32, None)],
    }
    if head_dim > 128:
        forms = {kernel: [(8, 2, 32, None), (8, 1, 32, None), (4, 1, 32, None)] for kernel in forms}
    for kernel, shapes in forms.items():
        yield kernel, table
        for form in shapes:
            for layout in layouts:
                yield kernel, replace(table, **{kernel: Launch(layout, *form)})


def sweep(
    shapes: Sequence[Shape], ratios: Sequence[float], combines: Sequence[str], folder: Path, seconds: float
) -> list[dict[str, Any]]:
    """Time the whole backward pass for each candidate; write `sweep_backward.json`, and stop after `seconds`.

    A candidate that does not compile, or differs from the table's own, is a row with its error.
    """
    from ..kernels import forward
    from ..kernels.recording import form_of
    from ..kernels.support import device_of
    from ..kernels.tuning import backward_launch

    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    end = time.monotonic() + seconds
    for shape in shapes:
        query, key, value, gate = shape.inputs("cuda", torch.bfloat16)
        grad = torch.randn_like(query)
        for combine in combines:
            for ratio in ratios:
                grid = TileGrid(shape.video_shape, (4, 4, 4))
                top_k = num_selected_tiles(grid.num_tiles, ratio)
                problem = Problem(grid, top_k, combine, shape.head_dim**-0.5)
                given = (query, key, value, gate if combine == "gate" else None, None)
                output, indices, lse = forward(*given, problem)
                arguments = (grad, *given, indices, lse, output, problem)
                table = backward_launch(form_of(query), problem, device_of(query.device.index), key.stride(1))
                right: list[torch.Tensor] = []
                for kernel, launch in candidates(table, shape.head_dim):
                    if time.monotonic() > end:
                        break
                    row = {"shape": shape.name, "combine": f"{combine}, gradient of {kernel}", "ratio": ratio}
                    row |= asdict(getattr(launch, kernel))
                    row |= _time((*arguments, launch), right)
                    rows.append(row)
            (folder / "sweep_backward.json").write_text(json.dumps(rows, indent=1))
    return rows


def _time(arguments: Sequence[Any], right: list[torch.Tensor]) -> dict[str, Any]:
    """Milliseconds and the largest difference from the gradients in `right`, which the first call fills."""
    from ..kernels import backward

    call: Callable[[], Sequence[torch.Tensor | None]] = functools.partial(backward, *arguments)
    try:
        grads = [grad for grad in call() if grad is not None]
        right.extend(grads[len(right) :])
        differences = [(x - y).float().norm() / y.float().norm() for x, y in zip(grads, right, strict=True)]
        return {"difference": float(torch.stack(differences).max()), "ms": time_ms(call, 60)}
    except Exception as error:  # one launch that cannot run must not end the sweep
        return {"error": f"{type(error).__name__}: {error}"[:300]}
