"""What a tuning found."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..comparison import Comparison
from .probe import Probe
from .search import Allocation, Cost
from .target import Target

if TYPE_CHECKING:
    from rich.table import Table

DEFAULT = "default"
"""In the place of a schedule's name: `enable_vsa(pipe, top_k_ratio=...)`."""


@dataclass(frozen=True)
class Point:
    """One setting, and what its whole videos showed, in means over the prompts.

    Args:
        name: what it is called.
        schedule: name of its schedule.
        config: the pattern form that `enable_vsa` takes, ready for JSON.
        cost: as it was counted.
        kept: mean share of the tiles that is kept, over layers and steps.
        psnr: dB to the dense videos; infinity where they are the same.
        ssim: to the dense videos.
        speedup: times as fast as dense in denoising.
        error: of the transformer's output; `None` where it was not measured.
        allocation: its schedule and levels; `None` for the default.
        proven: whether it may be chosen: it is the default, the schedule of that, or one that beats it by more than
            chance on these prompts.
    """

    name: str
    schedule: str
    config: dict[str, Any]
    cost: float
    kept: float
    psnr: float
    ssim: float
    speedup: float
    error: float | None
    allocation: Allocation | None = None
    proven: bool = True

    def value(self, name: str) -> float:
        """The number that a target of this name is about."""
        found = getattr(self, name)
        return math.nan if found is None else float(found)

    def to_dict(self) -> dict[str, Any]:
        """All but the allocation, ready for JSON."""
        shown = {name: value for name, value in vars(self).items() if name != "allocation"}
        levels = None if self.allocation is None else list(self.allocation.levels)
        return shown | {"psnr": self.psnr if math.isfinite(self.psnr) else None, "levels": levels}


@dataclass(frozen=True)
class Tuning:
    """The result of `tune`.

    Args:
        target: what was wanted.
        points: all settings of which whole videos were made.
        probe: what was measured of the layers.
        cost: how costs were counted.
        comparison: the whole videos, with the dense ones.
        directory: where everything was written.
        command: what started it, if it was told.
    """

    target: Target
    points: tuple[Point, ...]
    probe: Probe
    cost: Cost
    comparison: Comparison
    directory: Path
    command: str | None = None

    @property
    def is_met(self) -> bool:
        """Whether a setting reaches the target."""
        return self.target.beyond(self.best.value(self.target.name)) >= 0

    @property
    def best(self) -> Point:
        """See `best_of`."""
        return best_of(self.points, self.target)

    @property
    def default(self) -> Point | None:
        """The default `enable_vsa(pipe, top_k_ratio=...)` whose cost is nearest to that of the best."""
        defaults = [each for each in self.points if each.allocation is None]
        return min(defaults, key=lambda each: abs(each.cost - self.best.cost)) if defaults else None

    @property
    def frontier(self) -> list[Point]:
        """The points that no other one beats in both cost and quality, by cost."""
        name = self.target.chooses_by
        found: list[Point] = []
        for each in sorted(self.points, key=lambda each: (each.cost, -each.value(name))):
            if not found or each.value(name) > found[-1].value(name):
                found.append(each)
        return found

    def shares(self, point: Point) -> np.ndarray:
        """The share of the tiles that each layer keeps at each step, `[layers, steps]`."""
        if point.allocation is None:
            return np.full((len(self.probe.layers), self.probe.total), point.kept)
        return point.allocation.shares(self.probe)

    def to_dict(self) -> dict[str, Any]:
        """All numbers, ready for JSON."""
        probe = self.probe
        shown = self.comparison.to_dict()
        return {
            **{name: shown[name] for name in ("model", "pipeline", "dtype", "device", "hardware", "versions")},
            "prompts": shown["prompts"],
            "arguments": shown["arguments"],
            "seed": shown["seed"],
            "command": self.command,
            "target": {self.target.name: self.target.value},
            "met": self.is_met,
            "best": self.best.name,
            "cost": self.cost.reason,
            "points": [each.to_dict() for each in self.points],
            "frontier": [each.name for each in self.frontier],
            "probe": {
                "layers": list(probe.layers), "steps": list(probe.steps), "total": probe.total, "tiles": probe.tiles,
                "default_tiles": probe.default_tiles,
                "block_size": probe.tiling.block, "selection": probe.tiling.selection,
                "errors": probe.errors.tolist(), "gains": probe.gains.tolist(),
            },
        }  # fmt: skip

    def table(self) -> Table:
        """The settings for a terminal, by cost."""
        from .report import table

        return table(self)


_STUDENT = (6.31, 2.92, 2.35, 2.13, 2.02, 1.94, 1.89, 1.86, 1.83, 1.81)
"""The 95 % quantiles of Student's distribution by degrees of freedom, from 1 on; the last one holds for more."""


def is_beyond_chance(gains: Sequence[float]) -> bool:
    """Whether the mean of paired differences is above 0 at a level of 5 %, one-sided; one difference tells nothing."""
    count = len(gains)
    if count < 2:
        return False
    error = statistics.stdev(gains) / math.sqrt(count)
    return statistics.fmean(gains) > _STUDENT[min(count - 1, len(_STUDENT)) - 1] * error


def best_of(points: Sequence[Point], target: Target) -> Point:
    """Of the settings that reach the target the cheapest, or for a speed the best; if none does, the nearest."""
    points = [each for each in points if each.proven]
    beyond = {each.name: target.beyond(each.value(target.name)) for each in points}
    met = [each for each in points if beyond[each.name] >= 0]
    if not met:
        return max(points, key=lambda each: beyond[each.name])
    if target.is_quality:
        return min(met, key=lambda each: (each.cost, -beyond[each.name]))
    return max(met, key=lambda each: each.value(target.chooses_by))


def by_cost(points: Sequence[Point]) -> list[Point]:
    """Cheapest first."""
    return sorted(points, key=lambda each: (each.cost, each.name))
