"""Learning rates over the steps of a training, also of one that is made longer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.optimization import get_scheduler

# Those of diffusers' that need nothing but a warm-up and a length.
SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")


@dataclass(frozen=True)
class Stretch:
    """From the step `start` on, the training was meant to have `total` steps, of which `warmup` warm up."""

    start: int
    total: int
    warmup: int


class LearningRates:
    """Gives every group of the optimisers its own rate times a factor of the steps that are done.

    A training that is made longer follows the curve of the new length from there on. It comes to it from where it was
    in as many steps as the warm-up has, so that a finished cosine does not jump.

    Args:
        optimizers: their groups have rates and, under "name", what reports call them.
        schedule: one of `SCHEDULES`.
        total, warmup: steps of the training.
    """

    def __init__(self, optimizers: Iterable[torch.optim.Optimizer], schedule: str, total: int, warmup: int):
        self.optimizers, self.schedule = list(optimizers), schedule
        self.own = [group["lr"] for group in self._groups()]
        self.count = 0
        self.stretches: list[Stretch] = []
        self._curves: list[Callable[[int], float]] = []
        self._add(Stretch(0, total, warmup))
        self._apply()

    def step(self) -> None:
        """Count a step."""
        self.count += 1
        self._apply()

    def current(self) -> dict[str, float]:
        """Rates by name."""
        return {group["name"]: group["lr"] for group in self._groups()}

    def highest(self) -> dict[str, float]:
        """Every group's own rate, by name."""
        return {group["name"]: own for group, own in zip(self._groups(), self.own, strict=True)}

    def before_last(self) -> float:
        """The factor where the last stretch begins, as the stretches before it have it."""
        return self._factor(self.stretches[-1].start, max(1, len(self.stretches) - 1))

    def factor(self, count: int) -> float:
        """What every group's own rate is multiplied with after `count` steps."""
        return self._factor(count, len(self.stretches))

    def state(self) -> dict[str, Any]:
        """What `load` reads, ready for JSON."""
        return {"count": self.count, "stretches": [[each.start, each.total, each.warmup] for each in self.stretches]}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a state that `check_rates` has seen, if need be with another length."""
        wanted = self.stretches[-1]
        self.count, self.stretches, self._curves = state["count"], [], []
        for values in state["stretches"]:
            self._add(Stretch(*values))
        if (self.stretches[-1].total, self.stretches[-1].warmup) != (wanted.total, wanted.warmup):
            self._add(Stretch(self.count, wanted.total, wanted.warmup))
        self._apply()

    def _factor(self, count: int, stretches: int) -> float:
        stretch, value = self.stretches[stretches - 1], self._curves[stretches - 1](count)
        if stretches == 1:
            return value
        if count < stretch.start:
            return self._factor(count, stretches - 1)
        before = self._factor(stretch.start, stretches - 1)
        share = min(1.0, (count - stretch.start + 1) / max(1, stretch.warmup))
        return before + (value - before) * share

    def _add(self, stretch: Stretch) -> None:
        # The curve is all that is wanted; a scheduler of diffusers' changes its optimiser's rates.
        bystander = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=self.own[0] or 1.0)
        scheduler = get_scheduler(
            self.schedule, bystander, num_warmup_steps=stretch.warmup, num_training_steps=stretch.total
        )
        self.stretches.append(stretch)
        self._curves.append(scheduler.lr_lambdas[0])

    def _apply(self) -> None:
        factor = self.factor(self.count)
        for group, own in zip(self._groups(), self.own, strict=True):
            group["lr"] = own * factor

    def _groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]


def check_rates(state: Any) -> None:
    """Raise `ValueError` unless it is what `LearningRates.state` returns."""

    def whole(value: Any) -> bool:
        return type(value) is int and value >= 0

    fits = (
        isinstance(state, dict)
        and state.keys() == {"count", "stretches"}
        and whole(state["count"])
        and isinstance(state["stretches"], list)
        and bool(state["stretches"])
        and all(isinstance(each, list) and len(each) == 3 and all(map(whole, each)) for each in state["stretches"])
    )
    if not fits:
        raise ValueError(
            f"learning_rates={state!r} is no count of steps with stretches of a start, a total and a warm-up."
        )
