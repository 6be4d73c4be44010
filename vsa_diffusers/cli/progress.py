"""Progress on stderr: bars on a terminal, lines elsewhere."""

from __future__ import annotations

import datetime
import time
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


class Lines(Progress):
    """A line, with the time since the first, for each thing that begins; for logs, where bars would show nothing."""

    def __init__(self) -> None:
        self.start = time.monotonic()

    def begin(self, what: str, steps: int | None) -> None:
        """Print what begins."""
        passed = datetime.timedelta(seconds=round(time.monotonic() - self.start))
        errors.print(f"{passed} {what}", markup=False, highlight=False, soft_wrap=True)


@contextmanager
def progress_bars(show: bool = True) -> Iterator[Progress]:
    """Bars that disappear when the block ends; where stderr is no terminal, lines that stay."""
    if show and not errors.is_terminal:
        yield Lines()
        return
    text = progress.TextColumn("{task.description}")
    columns = (text, progress.BarColumn(), progress.MofNCompleteColumn(), progress.TimeElapsedColumn())
    with progress.Progress(*columns, console=errors, transient=True, disable=not show) as bars:
        yield Bars(bars)
