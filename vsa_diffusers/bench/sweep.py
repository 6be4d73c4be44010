"""Try every launch of the sparse kernel on every shape, and keep the times for the tuning table."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..problem import Problem
from ..tiles import TileGrid, num_selected_tiles
from .measure import time_ms
from .shapes import Shape


def candidates(head_dim: int) -> Iterator[Any]:
    """Launches worth trying for 16-bit inputs and tiles of at most 64 tokens, the likeliest first."""
    from ..kernels.plans import Launch
    from ..kernels.support import HAS_DESCRIPTORS, device_of
    from ..kernels.tuning import HOPPER, LAYOUTS

    layouts = LAYOUTS if HAS_DESCRIPTORS else LAYOUTS[:2]
    # warps, stages, keys, registers, partial_stages
    forms: list[tuple[int, int, int, int | None, int]]
    if head_dim > 128:
        forms = [(8, 2, 32, None, 1), (8, 3, 32, None, 1), (4, 2, 32, None, 1), (8, 2, 64, None, 1)]
    elif head_dim > 64:
        forms = [(4, 3, 64, None, 1), (4, 3, 64, None, 2), (4, 3, 32, 168, 1), (4, 4, 32, 168, 1), (4, 2, 64, None, 2)]
    else:
        forms = [(4, 2, 64, 128, 1), (4, 3, 64, 128, 1), (4, 3, 64, 168, 1), (4, 4, 64, 168, 1), (4, 3, 64, None, 2)]
    for form in forms:
        for layout in layouts:
            yield Launch(layout, *form)
    processors = device_of(torch.cuda.current_device()).processors
    if head_dim in HOPPER and processors:
        programs = HOPPER[head_dim][0] * processors
        for layout in ("descriptor", "direct"):
            yield from (Launch(layout, programs=programs, sync_chunks=sync_chunks) for sync_chunks in (0, 1, 4, 8, 16))


def sweep(
    shapes: Sequence[Shape], ratios: Sequence[float], combines: Sequence[str], folder: Path, seconds: float
) -> list[dict[str, Any]]:
    """Time the whole forward for each candidate; write `sweep.json` after each shape, and stop after `seconds`.

    A candidate that does not compile, or differs from the first, is a row with its error.
    """
    from ..kernels import forward

    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    end = time.monotonic() + seconds
    for shape in shapes:
        query, key, value, gate = shape.inputs("cuda", torch.bfloat16)
        for combine in combines:
            given = gate if combine == "gate" else None
            right: dict[float, torch.Tensor] = {}
            for launch in candidates(shape.head_dim):
                for ratio in ratios:
                    if time.monotonic() > end:
                        break
                    grid = TileGrid(shape.video_shape, (4, 4, 4))
                    top_k = num_selected_tiles(grid.num_tiles, ratio)
                    problem = Problem(grid, top_k, combine, shape.head_dim**-0.5)
                    row = {"shape": shape.name, "combine": combine, "ratio": ratio, **asdict(launch)}
                    arguments = (query, key, value, given, None, problem, launch)
                    try:
                        output = forward(*arguments)[0].float()
                        first = right.setdefault(ratio, output)
                        row["difference"] = float((output - first).norm() / first.norm())
                        row["ms"] = time_ms(functools.partial(forward, *arguments), 60)
                    except Exception as error:  # one launch that cannot run must not end the sweep
                        row["error"] = f"{type(error).__name__}: {error}"[:300]
                    rows.append(row)
            (folder / "sweep.json").write_text(json.dumps(rows, indent=1))
    return rows


def best(rows: Sequence[dict[str, Any]]) -> list[str]:
    """For each shape and ratio, the three fastest launches that agree with the first, one line each."""
    lines = []
    groups = dict.fromkeys((row["shape"], row["combine"], row["ratio"]) for row in rows)
    for group in groups:
        mine = [row for row in rows if (row["shape"], row["combine"], row["ratio"]) == group and "ms" in row]
        mine = sorted((row for row in mine if row["difference"] < 0.02), key=lambda row: row["ms"])
        for row in mine[:3]:
            fields = ("layout", "warps", "stages", "keys", "registers", "partial_stages", "programs", "sync_chunks")
            launch = " ".join(f"{field}={row[field]}" for field in fields)
            lines.append(f"{group[0]} {group[1]} {group[2]:g}: {row['ms']:.3f} ms {launch}")
    failed = [row for row in rows if "error" in row or not row.get("difference", 0) < 0.02]
    lines += [f"{len(failed)} of {len(rows)} failed"] + [str(row)[:400] for row in failed[:3]]
    return lines
