"""Noise levels at which few-step students were trained, as schedulers of diffusers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

FASTWAN = (1.0, 0.757, 0.522)
"""Sigmas of FastWan's three steps."""


class DMDScheduler(FlowMatchEulerDiscreteScheduler):
    """FastWan's sampler: each step predicts the clean video, and adds fresh noise of the next level to it.

    Stock stochastic sampling at levels of its own, which `WanPipeline` cannot pass. They are not shifted: training has
    shifted them already. The noise is drawn from a generator of its own.
    """

    def __init__(self, sigmas: Sequence[float] = FASTWAN, seed: int = 0):
        super().__init__(shift=1.0, stochastic_sampling=True)
        self.levels = list(sigmas)
        self.seed = seed

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: str | torch.device | None = None, **others: Any
    ) -> None:
        """Take the levels of training.

        Raises:
            ValueError: another number of steps is asked for.
        """
        if num_inference_steps is not None and num_inference_steps != len(self.levels):
            raise ValueError(
                f"num_inference_steps={num_inference_steps}, but the model was trained for {len(self.levels)} steps."
            )
        super().set_timesteps(sigmas=self.levels, device=device)
        self.noise = torch.Generator().manual_seed(self.seed)

    def step(self, *args: Any, generator: torch.Generator | None = None, **others: Any) -> Any:
        """The stock step, its noise from the generator of this run."""
        return super().step(*args, generator=generator or self.noise, **others)


FASTH3 = {
    4: ((0.999, 0.749, 0.5, 0.25, 0.0), 12.0, 3.0),
    8: ((0.999, 0.874, 0.749, 0.624, 0.5, 0.375, 0.25, 0.125, 0.0), 10.0, 3.0),
}
"""By the number of forwards: positions before the shift, and the shifts of video and audio."""


def shifted(positions: Sequence[float], shift: float) -> list[float]:
    """Noise levels at these positions: `shift * p / (1 + (shift - 1) * p)`."""
    return [shift * position / (1 + (shift - 1) * position) for position in positions]


def ladder_schedulers(forwards: int) -> dict[str, Any]:
    """FastH3's two schedulers, for `pipe.update_components(**ladder_schedulers(8))`.

    Args:
        forwards: 4 or 8, as the student was trained for; the pipeline's `num_inference_steps` is one more.

    Raises:
        ValueError: there is no student of that many.
    """
    from diffusers import MiniMaxH3Scheduler

    if forwards not in FASTH3:
        raise ValueError(f"forwards={forwards}: students of FastH3 have {' or '.join(map(str, FASTH3))}.")
    positions, video, audio = FASTH3[forwards]

    class LadderScheduler(MiniMaxH3Scheduler):
        """The stock scheduler at the levels that its shift makes of the ladder."""

        def set_timesteps(
            self, num_inference_steps: int | None = None, device: str | torch.device | None = None, **others: Any
        ) -> None:
            if num_inference_steps not in (None, len(positions)):
                raise ValueError(
                    f"num_inference_steps={num_inference_steps}, but {forwards} forwards make {len(positions)}."
                )
            super().set_timesteps(device=device, sigmas=shifted(positions, self.shift))

    return {"scheduler": LadderScheduler(shift=video), "audio_scheduler": LadderScheduler(shift=audio)}
