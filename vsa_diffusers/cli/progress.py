"""Progress bars on stderr."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich import progress

from ..generation.progress import Progress
from .output import errors

if TYPE_CHECKING:
    from collections.abc import Iterator


class Bars(Progress):
    """One bar after another."""

    def __init__(self, bars: progress.Progress):
        self.bars = bars

    def begin(self, what: str, steps: int | None) -> None:
        """Hide the bar before, and show one of so many steps, or one that only moves."""
        for task in self.bars.tasks:
            self.bars.remove_task(task.id)
        self.bars.add_task(what, total=steps)

    def step(self) -> None:
        """One step further."""
        if self.bars.tasks and self.bars.tasks[-1].total is not None:
            self.bars.advance(self.bars.tasks[-1].id)


@contextmanager
def progress_bars(show: bool = True) -> Iterator[Bars]:
    """Bars that disappear when the block ends."""
    text = progress.TextColumn("{task.description}")
    columns = (text, progress.BarColumn(), progress.MofNCompleteColumn(), progress.TimeElapsedColumn())
    with progress.Progress(*columns, console=errors, transient=True, disable=not show) as bars:
        yield Bars(bars)
