"""The way from dense attention to the target: a few stages, so that nothing is tuned or compiled anew at every step."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SparsityRamp:
    """`top_k_ratio` as a function of the training step.

    Args:
        target: the ratio in the end.
        steps: how long the way down takes; 0 starts at the target.
        start: steps that stay dense (ratio 1.0) before.
        stages: number of equal steps down, each as long as the others.
    """

    target: float
    steps: int = 0
    start: int = 0
    stages: int = 10

    def __post_init__(self) -> None:
        if not 0 < self.target <= 1:
            raise ValueError(f"target={self.target} must be in (0, 1]: the share of key tiles kept, such as 0.125.")
        if self.steps < 0 or self.start < 0 or self.stages < 1:
            raise ValueError(
                f"steps={self.steps} and start={self.start} must be 0 or more, and stages={self.stages} at least 1."
            )

    def ratio(self, step: int) -> float:
        """The ratio to train with at `step`, counted from 0."""
        if step >= self.start + self.steps:
            return self.target
        if step < self.start:
            return 1.0
        stage = (step - self.start) * self.stages // self.steps
        return 1.0 - (1.0 - self.target) * stage / self.stages
