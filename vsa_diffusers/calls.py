"""The attention calls of one forward, counted while it runs.

Nothing of this is seen by `torch.compile`: sparse calls are counted where the registered operator runs, which compiled
code calls as it is, and dense ones where their reason is found, if that is not compiled.
"""

from __future__ import annotations

import threading


class Tally:
    """Of one forward in one thread.

    Attributes:
        sparse: calls of the sparse operation.
        whole: those of them that kept all tiles.
        obstacle: why the last of them did not go to the Triton kernels, as a kind and in words; `None` if it did.
        dense: by kind of reason, the last reason, and the names of the modules whose calls ran dense for it.
    """

    def __init__(self) -> None:
        self.sparse = self.whole = 0
        self.obstacle: tuple[str, str] | None = None
        self.dense: dict[str, tuple[str, list[str]]] = {}

    def add_sparse(self, obstacle: tuple[str, str] | None, whole: bool) -> None:
        """Count a call of the sparse operation."""
        self.sparse += 1
        self.whole += whole
        self.obstacle = obstacle

    def add_dense(self, kind: str, reason: str, module: str) -> None:
        """Count a dense call."""
        _, modules = self.dense.get(kind, ("", []))
        self.dense[kind] = reason, [*modules, module]


class _Running(threading.local):
    """The tally of the forward that this thread runs; `None` where nobody counts."""

    tally: Tally | None = None


running = _Running()
