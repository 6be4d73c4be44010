"""Whether the Hopper kernel works with the installed Triton: a small call of its kind, beside the portable kernel.

Gluon, in which it is written, is experimental and changes from release to release, so that a list of releases would be
wrong for each new one. The first call of a kind in a process settles it, before that call is recorded. Without it, and
without the Hopper kernel, goes a process that is started with VSA_DIFFUSERS_HOPPER=0.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
import triton

from ..problem import Problem
from ..tiles import TileGrid
from .buffers import ForwardTensors
from .plans import Launch
from .recording import TensorForm

logger = logging.getLogger(__name__)

Compute = Callable[[ForwardTensors, Problem, Launch], None]
TILES = (2, 3, 3)  # of the small call
TOP_K = 7
HEADS = 2
PROGRAMS = 5  # few enough for each to take several query tiles
MOST_CONTEXT = 70  # tokens on a side: a whole step of 64 keys, and a part of one
TOLERANCE = 0.02  # in bf16 two right kernels differ by a third of that, and one wrong tile makes many times as much
SWITCH = "VSA_DIFFUSERS_HOPPER"
PATIENCE = 60.0  # seconds for the small call, which takes less than a thousandth of one
COST = "about a tenth slower than it could be (9 to 16 % where it was measured)"


class Kind(NamedTuple):
    """Calls that run the same code of the kernel, but for the extents of tiles."""

    device: torch.device
    head_dim: int
    combine: str
    layout: str
    partial: bool
    context: bool
    masked: bool


_verdicts: dict[Kind, bool] = {}
_told: set[str] = set()
_lock = threading.Lock()


def hopper_works(
    query: TensorForm, problem: Problem, launch: Launch, masked: bool, compute: Compute, capturing: bool
) -> bool | None:
    """Whether the Hopper kernel gives what the portable one does for calls of this kind; tried once in a process.

    Args:
        query: its form `[B, S, H, D]`.
        problem: of the call.
        launch: with which the Hopper kernel would run.
        masked: whether there is a mask of context tokens.
        compute: writes `output` and `lse` of a forward call with the kernel that a launch asks for.
        capturing: whether launches go into a CUDA graph, where nothing can be looked at.

    Returns:
        `None` where nobody knows yet and it cannot be tried now.

    Raises:
        RuntimeError: the small call does not end.
    """
    if os.environ.get(SWITCH) == "0":
        return False
    partial = any(extent % side for extent, side in zip(problem.grid.video_shape, problem.grid.block_size, strict=True))
    context = problem.num_context > 0
    kind = Kind(query.device, query.shape[-1], problem.combine, launch.layout, partial, context, masked)
    if kind not in _verdicts:
        if capturing:
            _warn("captured", "a CUDA graph is being captured, and no call like this one was made before it")
            return None
        with _lock:
            if kind not in _verdicts:
                # The call that asks may be under a mode that watches what is asked of its own tensors.
                with torch._C.DisableTorchFunction(), torch.no_grad():
                    reason = _why_not(kind, problem, launch, compute)
                if reason is not None:
                    _warn("fails", reason)
                _verdicts[kind] = reason is None
    return _verdicts[kind]


def verdicts() -> dict[Kind, bool]:
    """What has been found out in this process, by kind of call."""
    return dict(_verdicts)


def _why_not(kind: Kind, problem: Problem, launch: Launch, compute: Compute) -> str | None:
    small = _small_problem(kind, problem)
    both = []
    try:
        for programs, chunks in ((0, 0), (min(launch.programs, PROGRAMS), min(launch.sync_chunks, 2))):
            tensors = _tensors(kind, small)
            compute(tensors, small, replace(launch, programs=programs, sync_chunks=chunks))
            both.append((tensors.output, tensors.lse))
            if not programs:
                _await_gpu(kind.device, math.inf)  # and whatever the user had asked for before
    except Exception as error:
        first = next(iter(str(error).strip().splitlines()), "")
        return f"it does not run here ({type(error).__name__}: {first[:200]})"
    if not _await_gpu(kind.device, PATIENCE):
        # It blocks the GPU for all that comes after, so nothing can take its place in this process.
        raise RuntimeError(
            f"the kernel that is specialised for Hopper does not end with Triton {triton.__version__}: a small call "
            f"had {PATIENCE:g} s. This process cannot use the GPU any more; start it again with {SWITCH}=0 in its "
            f"environment, for the portable kernel ({COST}), or with another release of Triton."
        )
    errors = [_relative_error(found, expected) for expected, found in zip(*both, strict=True)]
    # NaN is no small error either.
    return None if all(error < TOLERANCE for error in errors) else f"its results are wrong here (errors {errors})"


def _small_problem(kind: Kind, problem: Problem) -> Problem:
    """One of the same kind: with partial tiles on the axes that have some, and context on the same sides."""
    grid = problem.grid
    shape = tuple(
        (tiles - 1) * side + (extent % side or side)
        for tiles, side, extent in zip(TILES, grid.block_size, grid.video_shape, strict=True)
    )
    before, after = (min(count, MOST_CONTEXT) for count in (problem.before, problem.after))
    small = TileGrid((shape[0], shape[1], shape[2]), grid.block_size)
    return Problem(small, TOP_K, problem.combine, kind.head_dim**-0.5, before, after)


def _tensors(kind: Kind, problem: Problem) -> ForwardTensors:
    """The tensors of the small call, always the same; outputs are NaN where nothing is written."""
    # On the CPU, so that the GPU's own generator stays where the user has it.
    generator = torch.Generator().manual_seed(0)
    tokens = problem.grid.num_tokens + problem.num_context
    shape = (4, 1, tokens, HEADS, kind.head_dim)
    random = torch.randn(shape, generator=generator, device="cpu").to(kind.device, torch.bfloat16)
    query, key, value, gate = random.unbind()
    lse = torch.full((1, HEADS, tokens), math.nan, device=kind.device)
    indices = torch.empty((1, HEADS, problem.grid.num_tiles, problem.top_k), dtype=torch.int32, device=kind.device)
    mask = None
    if kind.masked:
        mask = torch.ones((1, problem.num_context), dtype=torch.int32, device=kind.device)
        mask[:, : problem.num_context // 2] = 0
    gated = gate if problem.combine == "gate" else None
    return ForwardTensors(query, key, value, gated, torch.full_like(query, math.nan), indices, lse, mask)


def _await_gpu(device: torch.device, seconds: float) -> bool:
    """Wait until the GPU has done what was asked of it; whether it has within so many seconds."""
    if device.type != "cuda":
        return True
    done = torch.cuda.Event()
    done.record(torch.cuda.current_stream(device))
    end = time.monotonic() + seconds
    while not done.query():
        if time.monotonic() > end:
            return False
        time.sleep(1e-4)
    return True


def _relative_error(found: torch.Tensor | None, expected: torch.Tensor | None) -> float:
    assert found is not None
    assert expected is not None
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def _warn(kind: str, reason: str) -> None:
    """Once for each kind of reason in a process."""
    if kind not in _told:
        _told.add(kind)
        mend = "make one call before the capture" if kind == "captured" else "choose another release of Triton"
        logger.warning(
            "The kernel that is specialised for Hopper is not used with Triton %s: %s. Attention takes the portable "
            "kernel, %s; to mend it, %s.", triton.__version__, reason, COST, mend,
        )  # fmt: skip
