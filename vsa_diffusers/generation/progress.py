"""Who wants to know how far a video is."""

from __future__ import annotations


class Progress:
    """Told of each video and of its denoising steps; this one keeps it to itself."""

    def begin(self, what: str, steps: int | None) -> None:
        """Something begins that takes so many steps; `None` if they are not told one by one."""

    def step(self) -> None:
        """One of the steps is done."""
