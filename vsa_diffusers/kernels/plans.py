"""How a call runs: what `tuning.py` settles and the launchers are told."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..problem import Problem

PARTIAL_ROWS = (
    32  # rows that the shorter loops take in one step, at most: they must not hold registers from the main one
)


@dataclass(frozen=True)
class Launch:
    """How the sparse kernel runs.

    Args:
        layout: where it reads key and value: `"direct"` from the inputs, `"tiled"` from a copy in tile order,
            `"descriptor"` from that copy through tensor descriptors (compute capability 9.0 or later).
        warps, stages: warps of a program, and buffers of its main loop's pipeline.
        keys: keys of one step, at most; a power of two.
        registers: most registers of a thread, so that more programs share a processor (CUDA only).
        tail_stages: buffers where it walks partial tiles.
        programs: of the kernel in `specialised.py`, which takes query tiles in turns, where it can run; 0 for the
            ordinary one.
        parts: of a list, before each of which those programs wait for one another; 0 where they need not.
    """

    layout: str = "direct"
    warps: int = 4
    stages: int = 2
    keys: int = 64
    registers: int | None = None
    partial_stages: int = 1
    programs: int = 0
    sync_chunks: int = 0

    @property
    def options(self) -> dict[str, int]:
        """What Triton's launcher takes of it."""
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.warps, "num_stages": self.stages, **limit}


@dataclass(frozen=True)
class Plan:
    """How one call runs: the sparse kernel's launch, and what the other kernels need to know of the device."""

    sparse: Launch
    heads: int  # heads that go through all kernels at a time
    precision: str  # of the products between tile means
    step: int  # tile means that those take at a time


@dataclass(frozen=True)
class BackwardLaunch:
    """How the two large kernels of the backward pass run.

    Args:
        query: the gradient of the query, which reads key and value.
        key: the gradients of key and value, which read query and the output's gradient.
    """

    query: Launch
    key: Launch


@dataclass(frozen=True)
class BackwardPlan(BackwardLaunch):
    """How one backward call runs."""

    heads: int  # heads that go through all kernels at a time
    precision: str  # of products of tile means


# Programs of the specialised kernel that a multiprocessor has room for, by head_dim.
PROGRAMS = {64: 3, 128: 2}


def may_specialise(query: torch.Tensor, problem: Problem) -> bool:
    """Whether the kernel in `specialised.py` has been written for such a call, wherever key and value lie."""
    shape_fits = query.shape[-1] in PROGRAMS and 32 < problem.grid.tile_capacity <= 64
    return shape_fits and query.dtype == torch.bfloat16
