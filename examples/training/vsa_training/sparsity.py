"""Sparsity annealing: the way from many tiles to the target, in few stages, so that little is tuned anew."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SparsityRamp:
    """`top_k_ratio` as a function of the training step.

    Args:
        target: the ratio in the end.
        steps: how long the way down takes; 0 starts at the target.
        start: steps that stay at `first` before.
        stages: number of equal steps down, each as long as the others.
        first: the ratio that the way down begins at; 1 is dense.
    """

    target: float
    steps: int = 0
    start: int = 0
    stages: int = 10
    first: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.target <= 1:
            raise ValueError(f"target={self.target} must be in (0, 1]: the share of key tiles kept, such as 0.125.")
        if not self.target <= self.first <= 1:
            raise ValueError(f"first={self.first} must be in [target={self.target}, 1], so that the ratio falls.")
        if self.steps < 0 or self.start < 0 or self.stages < 1:
            raise ValueError(
                f"steps={self.steps} and start={self.start} must be 0 or more, and stages={self.stages} at least 1."
            )

    def ratio(self, step: int) -> float:
        """The ratio to train with at `step`, counted from 0."""
        if step >= self.start + self.steps:
            return self.target
        if step < self.start:
            return self.first
        stage = (step - self.start) * self.stages // self.steps
        return self.first - (self.first - self.target) * stage / self.stages
