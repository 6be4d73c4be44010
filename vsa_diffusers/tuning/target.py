"""What a tuning is to reach."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ..tiles import is_real

TOLERANCES = {"psnr": 0.3, "ssim": 0.003, "error": 0.003, "speedup": 0.02}
"""How far beyond the target is close enough to stop."""
TARGETS = tuple(TOLERANCES)
_RANGES = {"psnr": (0, math.inf), "ssim": (0, 1), "error": (0, 1), "speedup": (1, math.inf)}
_WHAT = {
    "psnr": "dB to the dense video, above 0, such as 30",
    "ssim": "similarity to the dense video, between 0 and 1, such as 0.95",
    "error": "of the transformer's output, between 0 and 1, such as 0.05",
    "speedup": "times as fast as dense, above 1, such as 1.4",
}


@dataclass(frozen=True)
class Target:
    """A wanted quality at least cost, or a wanted speed at best quality.

    Args:
        name: "psnr", "ssim", "error" (of the transformer's output) or "speedup" (of denoising).
        value: the least of it; of the error the most.
    """

    name: str
    value: float

    @classmethod
    def one_of(cls, targets: Mapping[str, float | None]) -> Target:
        """The one that is given.

        Raises:
            ValueError: none or several are, or it is out of range.
        """
        given = {name: value for name, value in targets.items() if value is not None}
        if len(given) != 1:
            got = " and ".join(f"{name}={value!r}" for name, value in given.items()) or "none"
            raise ValueError(f"one target is needed, of {', '.join(targets)}, but there is {got}; for example psnr=30.")
        [(name, value)] = given.items()
        low, high = _RANGES[name]
        if not is_real(value) or not low < value < high:
            raise ValueError(f"{name}={value!r} must be {_WHAT[name]}.")
        return cls(name, float(value))

    @property
    def is_quality(self) -> bool:
        """Whether it is one that rises with the cost."""
        return self.name != "speedup"

    @property
    def chooses_by(self) -> str:
        """What schedules are compared by at equal cost: an error of single steps does not tell how they add up."""
        return "ssim" if self.name == "ssim" else "psnr"

    def beyond(self, value: float) -> float:
        """By how much a value is better than the target; negative if it is missed."""
        return self.value - value if self.name == "error" else value - self.value

    def __str__(self) -> str:
        words = {
            "psnr": f"PSNR of {self.value:g} dB", "ssim": f"SSIM of {self.value:g}",
            "error": f"transformer's error of {self.value:g}", "speedup": f"{self.value:g} times as fast as dense",
        }  # fmt: skip
        return words[self.name]
