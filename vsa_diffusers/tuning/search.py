"""From what was measured of single layers to settings of all of them, by a schedule and a budget.

A setting is a schedule, a curve over the run, and a level for every layer, the curve's mean there. What a level costs
and loses in a layer is known from the probe; the errors of layers and steps count as independent, so that their squares
add up. From the lowest level everywhere, that rise is made first, again and again, that takes most of the squared error
away for its cost. So one walk gives the settings of all budgets of one schedule. Beside it there are the settings of
the same level in all layers.

Which schedule is best the probe cannot tell, since an error early in a run changes all that follows: whole videos do.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..config import VSAConfig
from ..schedule import share_of
from ..steps import Position
from .probe import Probe


def _levels(count: int) -> tuple[float, ...]:
    return tuple(round(0.03 * (1 / 0.03) ** (place / (count - 1)), 3) for place in range(count))


LEVELS = _levels(18)
"""Means that a layer may keep; the last one is dense attention."""
EVEN_LEVELS = _levels(120)
"""The same where all layers keep alike, so that any budget is met nearly."""
TAIL = 0.05
"""What the steepest schedule keeps in the last step."""
STABLE = 0.1
"""Largest interquartile range of a layer's times, over their median, at which times are what is counted."""


@dataclass(frozen=True)
class Shape:
    """A schedule but for its mean.

    Args:
        name: what it is called.
        fields: of `VSAConfig`, for a mean in (0, 1).
    """

    name: str
    fields: Callable[[float], dict[str, Any]]


def _ramp(times: float, power: float) -> Callable[[float], dict[str, Any]]:
    """From so many times the mean, or all tiles, to what the mean then leaves for the last step."""

    def fields(mean: float) -> dict[str, Any]:
        first = min(1.0, times * mean)
        last = (mean * (power + 1) - first) / power
        return {"schedule": {"points": [[0.0, round(first, 4)], [1.0, round(last, 4)]], "power": power}}

    return fields


def _from_dense(mean: float) -> dict[str, Any]:
    """From all tiles to `TAIL` of them, or a quarter of a small mean, by the power that gives this mean."""
    last = min(TAIL, mean / 4)
    power = (1 - mean) / (mean - last)
    return {"schedule": {"points": [[0.0, 1.0], [1.0, round(last, 4)]], "power": round(power, 4)}}


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("constant", lambda mean: {"top_k_ratio": mean, "schedule": "constant"}),
        Shape("ramp", _ramp(1.75, 1.0)),
        Shape("front", lambda mean: {"top_k_ratio": mean, "schedule": "front"}),
        Shape("steep", _from_dense),
        Shape("dense start", lambda mean: {"top_k_ratio": mean, "schedule": "constant", "dense_steps": 0.2}),
    )
}
"""The schedules that are tried, by name."""


@dataclass(frozen=True)
class Cost:
    """What a layer costs at a ratio, as a part of what it costs dense.

    Args:
        times: seconds by share of the tiles, dense as share 0; `None` counts tiles instead.
        rest: seconds of a forward that are not attention.
        layers: how many attention layers a forward has.
        reason: what is counted, and why, in words.
    """

    times: Mapping[float, float] | None
    rest: float
    layers: int
    reason: str

    @classmethod
    def of_probe(cls, probe: Probe) -> Cost:
        """By the times that were measured, if they are stable, else by the share of the tiles that is kept."""
        times, layers = probe.times, len(probe.layers)
        if not times:
            reason = "mean share of the tiles that is kept, over layers and steps; times of layers were not measured"
        elif probe.spread > STABLE:
            reason = (
                "mean share of the tiles that is kept, over layers and steps: times of layers vary too much here, by "
                f"{probe.spread:.0%} (interquartile range over median)"
            )
        else:
            reason = f"time of the layers, as it was measured here (to {probe.spread:.0%}), over that of dense ones"
            by_share = {probe.share(ratio) if ratio else 0.0: seconds for ratio, seconds in times.items()}
            return cls(by_share, probe.rest, layers, reason)
        return cls(None, 0.0, layers, reason)

    @property
    def is_time(self) -> bool:
        """Whether times are counted, not tiles."""
        return self.times is not None

    def of(self, kept: float) -> float:
        """Of one layer and step that keep this share of the tiles, sparse."""
        if self.times is None:
            return kept
        known = sorted(each for each in self.times if each)
        seconds = [self.times[each] for each in known]
        if kept > known[-1]:
            slope = (seconds[-1] - seconds[-2]) / (known[-1] - known[-2])
            return (seconds[-1] + slope * (kept - known[-1])) / self.times[0.0]
        return float(np.interp(kept, known, seconds)) / self.times[0.0]

    def budget_for(self, speedup: float) -> float | None:
        """The mean cost at which a forward is so many times as fast as dense; `None` where times are not known."""
        if self.times is None:
            return None
        dense = self.layers * self.times[0.0]
        return ((dense + self.rest) / speedup - self.rest) / dense


@dataclass(frozen=True)
class Allocation:
    """A schedule, and a level for each layer.

    Args:
        name: of the search that it is from.
        shape: the schedule.
        levels: by layer, in order; 1 is dense.
        cost: mean over layers and steps, as `Cost` counts.
        kept: mean share of the tiles that is kept, over layers and steps, dense ones included.
        error: of the transformer's output as the probe predicts it, root of the mean square over steps.
    """

    name: str
    shape: Shape
    levels: tuple[float, ...]
    cost: float
    kept: float
    error: float

    def config(self, probe: Probe) -> dict[str, Any]:
        """The pattern form that `enable_vsa` takes, ready for JSON."""
        tiling = {
            "block_size": probe.tiling.block if isinstance(probe.tiling.block, str) else list(probe.tiling.block),
            "selection": probe.tiling.selection,
        }
        usual = Counter(level for level in self.levels if level < 1).most_common(1)
        level = usual[0][0] if usual else 1.0
        entries: dict[str, Any] = {"default": {"enable": level < 1} | self._fields(level) | tiling}
        for name, own in zip(probe.layers, self.levels, strict=True):
            if own != level:
                entries[name] = {"enable": False} if own >= 1 else self._fields(own)
        return entries

    def shares(self, probe: Probe) -> np.ndarray:
        """The share of the tiles that each layer keeps at each step, `[layers, total]`."""
        return np.stack([_shares(probe, _ratios(self.shape, level, probe.total)) for level in self.levels])

    def _fields(self, level: float) -> dict[str, Any]:
        return self.shape.fields(level) if level < 1 else {}


class Search:
    """All settings of one schedule, from the cheapest to dense.

    Args:
        probe: what was measured.
        cost: how costs are counted.
        shape: the schedule.
        even: the same level in all layers.
    """

    def __init__(self, probe: Probe, cost: Cost, shape: Shape, even: bool = False):
        self.probe = probe
        self.cost = cost
        self.shape = shape
        self.is_even = even
        self.levels = EVEN_LEVELS if even else LEVELS
        self.costs, self.kept, squares = [], [], []
        for level in self.levels:
            ratios = _ratios(shape, level, probe.total)
            shares = _shares(probe, ratios)
            of_step = [1.0 if ratio >= 1 else cost.of(share) for ratio, share in zip(ratios, shares, strict=True)]
            self.costs.append(math.fsum(of_step) / probe.total)
            self.kept.append(math.fsum(shares) / probe.total)
            squares.append(np.mean(probe.output_error(shares) ** 2, axis=1))
        self.squares = np.stack(squares, axis=1)  # [layers, levels]
        everywhere = ([place] * len(probe.layers) for place in range(len(self.levels)))
        self.walk = [*map(self._allocation, everywhere)] if even else list(self._walk())

    @property
    def name(self) -> str:
        """The schedule's, and whether layers are alike."""
        return f"{self.shape.name}, even" if self.is_even else self.shape.name

    def by_layer(self) -> Search:
        """The same schedule with a level for each layer."""
        return Search(self.probe, self.cost, self.shape)

    def at(self, budget: float) -> Allocation:
        """The setting of least predicted error that costs at most so much; the cheapest one if all cost more."""
        fitting = [each for each in self.walk if each.cost <= budget + 1e-9]
        return min(fitting, key=lambda each: each.error) if fitting else self.walk[0]

    def _walk(self) -> Iterator[Allocation]:
        places = [0] * len(self.probe.layers)
        yield self._allocation(places)
        while (rise := self._best_rise(places)) is not None:
            layer, place = rise
            places[layer] = place
            yield self._allocation(places)

    def _best_rise(self, places: Sequence[int]) -> tuple[int, int] | None:
        """The layer to raise next, and to where: what takes most squared error away for what it costs."""
        best, found = -math.inf, None
        for layer, place in enumerate(places):
            for higher in range(place + 1, len(self.levels)):
                gain = self.squares[layer, place] - self.squares[layer, higher]
                extra = self.costs[higher] - self.costs[place]
                rate = math.inf if extra <= 0 and gain > 0 else gain / max(extra, 1e-12)
                if rate > best:
                    best, found = rate, (layer, higher)
        return found

    def _allocation(self, places: Sequence[int]) -> Allocation:
        count = len(places)
        return Allocation(
            self.name,
            self.shape,
            tuple(self.levels[place] for place in places),
            math.fsum(self.costs[place] for place in places) / count,
            math.fsum(self.kept[place] for place in places) / count,
            math.fsum(self.squares[layer, place] for layer, place in enumerate(places)) ** 0.5,
        )


def default_at(probe: Probe, cost: Cost, budget: float) -> tuple[float, float]:
    """`top_k_ratio` of `enable_vsa` with all else by default, at the highest ratio that costs at most so much.

    Returns:
        The ratio, which is the very share of the tiles that is kept, and its cost.
    """
    tiles = probe.default_tiles
    counts = [count for count in range(1, tiles) if cost.of(count / tiles) <= budget + 1e-9] or [1]
    ratio = max(counts) / tiles
    return ratio, cost.of(ratio)


def _shares(probe: Probe, ratios: np.ndarray) -> np.ndarray:
    return np.array([probe.share(ratio) for ratio in ratios])


def _ratios(shape: Shape, level: float, total: int) -> np.ndarray:
    """Of every step, `[total]`; 1 where a step is dense."""
    if level >= 1:
        return np.ones(total)
    config = VSAConfig(**shape.fields(level))
    shares = (
        share_of(config.schedule, config.top_k_ratio, config.dense_steps, Position(step, total))
        for step in range(total)
    )
    return np.array([share.ratio for share in shares])
