"""Where the package's messages go unless the program says otherwise: to stderr, from INFO on.

    logging.getLogger("vsa_diffusers").setLevel(logging.WARNING)  # or logging.CRITICAL for silence

Records are handed on to the handlers of the program, if it has any, and the package's own handler stays quiet then:
what a program does with its log (`logging.basicConfig`, a file, pytest) is up to it, and nothing is printed twice.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

PACKAGE = "vsa_diffusers"


class StderrHandler(logging.Handler):
    """Prints to what is `sys.stderr` at that time, above the progress bars that may be there.

    It is quiet where another handler gets the record, and on all ranks of several processes but the first.
    """

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(levelname)s vsa_diffusers: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        """Print the record, if this handler is the one to do it."""
        if sys.stderr is None or self._gives_way() or not _is_first_rank():
            return
        from tqdm import tqdm  # pipelines' progress bars

        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except Exception:
            self.handleError(record)

    def _gives_way(self) -> bool:
        package, root = logging.getLogger(PACKAGE), logging.getLogger()
        others = package.handlers + (root.handlers if package.propagate else [])
        return any(handler is not self for handler in others)


def show_messages() -> None:
    """Give the package's logger its handler, and the level INFO unless it has one; once more is harmless."""
    logger = logging.getLogger(PACKAGE)
    if any(isinstance(handler, StderrHandler) for handler in logger.handlers):
        return
    logger.addHandler(StderrHandler())
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)


@contextmanager
def warnings_only() -> Iterator[None]:
    """In the block the package logs no less than warnings, unless its level was set to something else than INFO."""
    logger = logging.getLogger(PACKAGE)
    if logger.level != logging.INFO:
        yield
        return
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(logging.INFO)


def _is_first_rank() -> bool:
    from torch import distributed

    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0
