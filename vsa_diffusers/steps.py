"""Which of the user's denoising steps a forward belongs to, read from the loop that is running it."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

# How the loops of diffusers' pipelines name what they count with, and what they run over.
_COUNTERS = ("i", "index")
_OWNERS = ("self", "components", "pipe", "pipeline")


@dataclass(frozen=True)
class Position:
    """Where in a run a forward is.

    Args:
        step: the user's denoising step, from 0. A solver that calls the model twice a step makes both calls in one.
        total: how many of them the run has: the `num_inference_steps` asked for, less what `strength` skips.
    """

    step: int
    total: int

    def is_among_first(self, steps: int | float) -> bool:
        """Whether this is one of the first `steps`, a count (int), or a share of all (float), rounded up."""
        return self.step < self.count(steps)

    def count(self, steps: int | float) -> int:
        """How many steps the first `steps` are: see `is_among_first`."""
        return steps if isinstance(steps, int) else math.ceil(steps * self.total - 1e-9)


def position_in_run() -> Position | None:
    """The position of the forward that this thread is running; `None` if no denoising loop is calling it.

    Reads the variables of the innermost loop of the form `for i, t in enumerate(timesteps)` among the callers, as all
    pipelines of diffusers have it. What is remembered about a pipeline or its scheduler would be wrong as soon as
    several share a transformer, a scheduler is replaced or copied, or a run begins in the middle of its schedule.
    Nothing is read from a GPU.
    """
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        names = frame.f_locals if code.co_name == "<module>" else (*code.co_varnames, *code.co_cellvars)
        if "t" in names and any(counter in names for counter in _COUNTERS):
            position = _position_in_loop(frame.f_locals)
            if position is not None:
                return position
        frame = frame.f_back  # type: ignore[assignment]
    return None


def _position_in_loop(variables: Mapping[str, Any]) -> Position | None:
    t = variables.get("t")
    index = next((variables[name] for name in _COUNTERS if type(variables.get(name)) is int), None)
    if index is None or t is None:
        return None
    scheduler = _scheduler(variables)
    steps = next((steps for steps in _schedules(variables, scheduler) if _is_item(steps, index, t)), None)
    if steps is None:
        return None
    order = getattr(scheduler, "order", 1)
    count = len(steps)
    if steps is getattr(scheduler, "timesteps", None):
        # A pipeline may run over a part of its scheduler's steps, and then says of how many.
        count = getattr(variables.get("self"), "_num_timesteps", count)
    before, total = _stages(variables, count)
    return Position((before + index) // order, math.ceil(total / order))


def _schedules(variables: Mapping[str, Any], scheduler: Any) -> Sequence[Any]:
    """What the loop may run over: diffusion forcing has a matrix of steps, modular pipelines a state of their own."""
    return (
        variables.get("step_matrix"),
        variables.get("timesteps"),
        getattr(variables.get("block_state"), "timesteps", None),
        getattr(scheduler, "timesteps", None),
    )


def _scheduler(variables: Mapping[str, Any]) -> Any:
    owners = (getattr(variables.get(name), "scheduler", None) for name in _OWNERS)
    return next((each for each in (*owners, variables.get("scheduler")) if each is not None), None)


def _is_item(steps: Any, index: int, t: Any) -> bool:
    """Whether `t` is `steps[index]`: a view of the same memory, or an equal number."""
    if not isinstance(steps, (torch.Tensor, Sequence)) or not 0 <= index < len(steps):
        return False
    item = steps[index]
    if isinstance(item, torch.Tensor) and isinstance(t, torch.Tensor):
        return item is t or (item.data_ptr() == t.data_ptr() and item.shape == t.shape)
    return type(item) is type(t) and bool(item == t)


def _stages(variables: Mapping[str, Any], steps: int) -> tuple[int, int]:
    """Steps before this loop, and in all: Helios' pyramid runs one loop a resolution, each perhaps twice as long."""
    counts, stage = variables.get("pyramid_num_inference_steps_list"), variables.get("stage_idx")
    if counts is None or stage is None:
        return 0, steps
    factor = steps // counts[stage]
    return factor * sum(counts[:stage]), factor * sum(counts)
