"""How the share of kept tiles changes over a denoising run: when attention is exact decides more than where.

Early steps settle what a video shows and late ones its details, so that tiles are better spent at the front. A schedule
is `"constant"`; `"front"`, a budget whose mean over the run is `top_k_ratio`; or a `RatioSchedule` of one's own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from .steps import Position
from .tiles import is_real

NAMED = ("constant", "front")
AUTO = "front"
"""What `schedule="auto"` means with merge, by `docs/lab/schedule.md`; gates, trained for one ratio, are constant."""
FRONT_POWER = 2.0
FRONT_END = 0.25  # the last step's share of the mean
DENSE = 1 - 1e-9


@dataclass(frozen=True)
class RatioSchedule:
    """A curve of the ratio over a run.

    Args:
        points: `(share, ratio)` pairs: the share of the run in [0, 1], from 0 at the first step to 1 at the last, and
            the share of key tiles kept there, in (0, 1]; shares ascend, and one that stands twice is a jump, of which
            the later ratio counts. Before the first point and after the last one the ratio stays.
        power: of the fall between neighbouring points `(x0, r0)` and `(x1, r1)`, at the part u of the way:
            `r1 + (r0 - r1) * (1 - u) ** power`; 1 is a line, more falls early.

    Raises:
        ValueError: points or power are not as described.
    """

    points: tuple[tuple[float, float], ...]
    power: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "points", _points(self.points))
        if not is_real(self.power) or not 0 < self.power < math.inf:
            raise ValueError(f"schedule has power={self.power!r}, which must be a number above 0, such as 2.")
        object.__setattr__(self, "power", float(self.power))

    @classmethod
    def ramp(cls, first: float, last: float, power: float = 1.0) -> RatioSchedule:
        """From `first` to `last` over the run; with `power=2` it falls with the square."""
        return cls(((0.0, first), (1.0, last)), power)

    def at(self, share: float) -> float:
        """The ratio at this share of the run."""
        ratio = self.points[0][1]
        for (x0, r0), (x1, r1) in zip(self.points, self.points[1:], strict=False):
            if share >= x1:
                ratio = r1
            elif share > x0:
                return self._between(r0, r1, (share - x0) / (x1 - x0))
        return ratio

    def over(self, total: int) -> list[float]:
        """The ratios of a run of so many steps; a run of one step gets the mean."""
        return [self.mean] if total <= 1 else [self.at(step / (total - 1)) for step in range(total)]

    @property
    def mean(self) -> float:
        """Over a run of very many steps."""
        (first, ratio), (last, final) = self.points[0], self.points[-1]
        parts = [first * ratio, (1 - last) * final]
        for (x0, r0), (x1, r1) in zip(self.points, self.points[1:], strict=False):
            parts.append((x1 - x0) * (r1 + (r0 - r1) / (self.power + 1)))
        return math.fsum(parts)

    def _between(self, before: float, after: float, part: float) -> float:
        return after + (before - after) * (1 - part) ** self.power


Schedule = str | RatioSchedule


class Share(NamedTuple):
    """What one step keeps: the ratio, and whether that is dense attention itself."""

    ratio: float
    is_dense: bool = False


def check_schedule(schedule: Any) -> Schedule:
    """A schedule as `VSAConfig` keeps it.

    Args:
        schedule: `"auto"`, `"constant"`, `"front"`, a `RatioSchedule`, or a mapping with its fields.

    Raises:
        ValueError: it is none of them.
    """
    if isinstance(schedule, Mapping):
        if not {"points"} <= set(schedule) <= {"points", "power"}:
            raise ValueError(f"schedule={dict(schedule)!r} must have 'points' and perhaps 'power'.")
        return RatioSchedule(**schedule)
    if isinstance(schedule, RatioSchedule) or (isinstance(schedule, str) and schedule in ("auto", *NAMED)):
        return schedule
    raise ValueError(
        f"schedule={schedule!r} is unknown; choose 'auto', 'constant' or 'front', or pass a RatioSchedule, for example "
        "RatioSchedule.ramp(0.8, 0.05, power=2)."
    )


def front_loaded(mean: float, total: int) -> RatioSchedule:
    """The curve that spends a budget at the front: its mean over the steps of a run of `total` is `mean`.

    It falls with the square to a quarter of the mean. Where the first step would keep more than all tiles it keeps all,
    and the last one what the mean then leaves.
    """
    if total <= 1:
        return RatioSchedule.ramp(mean, mean)
    weight = math.fsum(((total - 1 - step) / (total - 1)) ** FRONT_POWER for step in range(total)) / total
    last = mean * FRONT_END
    first = last + (mean - last) / weight
    if first > 1:
        first, last = 1.0, (mean - weight) / (1 - weight)
    return RatioSchedule.ramp(first, last, FRONT_POWER)


def share_of(schedule: Schedule, top_k_ratio: float, dense_steps: int | float, position: Position | None) -> Share:
    """What a forward keeps; outside of a run the schedule's mean.

    A ratio of 1 is dense attention where the schedule says so, as are the first `dense_steps`.

    Args:
        schedule: settled, that is not "auto".
        top_k_ratio: the ratio if it is constant, and the mean of a budget.
        dense_steps: first steps that stay dense, whatever the schedule says of them.
        position: of the forward in its run; `None` outside of one.
    """
    if position is not None and position.is_among_first(dense_steps):
        return Share(1.0, True)
    if schedule == "constant":
        return Share(top_k_ratio)
    if schedule == "front":
        ratio = top_k_ratio if position is None else _at(front_loaded(top_k_ratio, position.total), position)
    else:
        assert isinstance(schedule, RatioSchedule)
        ratio = schedule.mean if position is None else _at(schedule, position)
    return Share(ratio, ratio >= DENSE)


def mean_share(schedule: Schedule, top_k_ratio: float, dense_steps: int | float, total: int) -> float:
    """The mean ratio over a run of `total` steps, dense ones included."""
    shares = (share_of(schedule, top_k_ratio, dense_steps, Position(step, total)) for step in range(total))
    return math.fsum(share.ratio for share in shares) / total


def needs_position(schedule: Schedule, dense_steps: int | float) -> bool:
    """Whether it matters which step a forward belongs to."""
    return schedule != "constant" or bool(dense_steps)


def _at(curve: RatioSchedule, position: Position) -> float:
    if position.total <= 1:
        return curve.mean
    return curve.at(min(1.0, position.step / (position.total - 1)))


def _points(points: Any) -> tuple[tuple[float, float], ...]:
    if isinstance(points, (str, bytes, Mapping)) or not isinstance(points, Sequence) or not points:
        raise ValueError(f"schedule has points={points!r}, which must be (share, ratio) pairs, as in {_EXAMPLE}.")
    checked: list[tuple[float, float]] = []
    for point in points:
        pair = tuple(point) if isinstance(point, (list, tuple)) else ()
        if len(pair) != 2 or not all(map(is_real, pair)) or not 0 <= pair[0] <= 1 or not 0 < pair[1] <= 1:
            raise ValueError(
                f"schedule has the point {point!r}, which must be a share of the run in [0, 1] and a ratio in (0, 1], "
                f"as in {_EXAMPLE}."
            )
        if checked and pair[0] < checked[-1][0]:
            raise ValueError(f"schedule has points={points!r}, whose shares of the run must ascend, as in {_EXAMPLE}.")
        checked.append((float(pair[0]), float(pair[1])))
    return tuple(checked)


_EXAMPLE = "points=[(0, 0.8), (0.5, 0.2), (1, 0.05)]"
