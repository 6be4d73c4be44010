"""What one call of the operation computes: the contract between it and its implementations."""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields

from .tiles import TileGrid


@dataclass(frozen=True)
class Problem:
    """What one call computes, apart from its tensors. `before` and `after` count the context tokens on either side."""

    grid: TileGrid
    top_k: int
    combine: str
    scale: float
    before: int = 0
    after: int = 0
    selection: str = "mean"

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        """Recorded launches are found by it, at every call."""
        return hash(tuple(getattr(self, field.name) for field in fields(self)))

    @property
    def video(self) -> slice:
        """The video tokens of the sequence."""
        return slice(self.before, self.before + self.grid.num_tokens)

    @property
    def has_coarse(self) -> bool:
        """Whether the coarse branch is added to the sparse one."""
        return self.combine in ("gate", "sum")

    @property
    def has_pooled_keys(self) -> bool:
        """Whether pooled keys stand for tiles that are not kept."""
        return self.combine == "merge" and self.top_k < self.grid.num_tiles

    @property
    def num_context(self) -> int:
        """Context tokens on both sides."""
        return self.before + self.after
