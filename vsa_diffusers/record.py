"""What came of a transformer's forwards since VSA was enabled: counts, reasons, the last grid, and the log of them."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .calls import Tally
from .tiles import TileGrid
from .wording import as_arguments, by, grouped

logger = logging.getLogger(__name__)

MOST_GRIDS = 64  # that are told from new ones
LOGGED_GRIDS = 8  # at INFO; training may have a new one every step
MOST_KINDS = 32
STEP, GRID, OTHER = "step", "grid", "other"
DENSE_STEP = "this denoising step is dense"
# One for all records: transformers are copied and pickled with theirs, which a lock cannot be.
_lock = threading.Lock()

Dense = Mapping[str, tuple[str, list[str]]]
"""Dense calls by kind of reason: the reason, and the modules."""


@dataclass(frozen=True)
class Tiling:
    """How a video is cut, and how much of it is kept.

    Args:
        video_shape: `(T, H, W)`, the grid of tokens.
        block_size: `(t, h, w)`, tokens of a tile.
        tokens: on the grid that is cut; Motif-Video attends over two videos.
        tiles: that this grid makes.
        padding: share of the tiles' places that hold no token.
        kept: key tiles that each query tile keeps.
    """

    video_shape: tuple[int, int, int]
    block_size: tuple[int, int, int]
    tokens: int
    tiles: int
    padding: float
    kept: int

    @classmethod
    def now(cls, processor: Any) -> Tiling | None:
        """That of the processor in the forward that this thread runs; `None` without a grid."""
        facts = processor.state.facts
        if facts.grid is None:
            return None
        grid = TileGrid(processor.tiled_grid(facts.grid), facts.block_size)
        return cls(facts.grid, facts.block_size, grid.num_tokens, grid.num_tiles, grid.padding, facts.kept)


class Record:
    """Of one transformer. Counts are those of all threads together; a copy of the transformer counts by itself.

    Attributes:
        forwards: that have ended.
        sparse: calls of the sparse operation in them that could leave tiles out.
        dense: dense calls by kind of reason, those with a coarse branch among them; not those of layers that are never
            sparse.
        reasons: the last reason of each kind.
        unseen: calls that were not seen, if they were made: see `calls`.
        tilings: how the last forward with a grid cut it; several where modules are configured otherwise than others.
        implementation: what served the last sparse call, "triton" or "torch"; `None` before the first one.
        obstacle: why it was not "triton".
    """

    def __init__(self) -> None:
        self.forwards = self.sparse = self.unseen = 0
        self.dense: Counter[str] = Counter()
        self.reasons: dict[str, str] = {}
        self.tilings: tuple[Tiling, ...] = ()
        self.implementation: str | None = None
        self.obstacle: str | None = None
        self._grids: dict[tuple[Any, ...], None] = {}
        self._told: set[tuple[str, str]] = set()
        self._logged_grids = 0

    def add(self, label: str, tally: Tally, processors: Mapping[str, Any]) -> None:
        """Count a forward that ends in this thread, and log what is new.

        Args:
            label: the transformer's name in the log.
            tally: of the forward.
            processors: those of its sparse modules, and of dense ones with a coarse branch, by the modules' names.
        """
        layers = [name for name, each in processors.items() if each.stays_dense][: tally.whole]
        processors = {name: each for name, each in processors.items() if not each.stays_dense}
        leaders = {processor.state.place: processor for processor in processors.values()}.values()
        tilings = tuple(dict.fromkeys(tiling for leader in leaders if (tiling := Tiling.now(leader))))
        # The operation makes these and those of the layers, too: the coarse branch is not in stock attention.
        whole = [name for name, each in processors.items() if each.state.facts.dense_step and each.keeps_coarse]
        del whole[tally.whole - len(layers) :]
        calls = tally.sparse - len(layers) - len(whole)
        found = tally.dense or _dense_unseen(processors)
        if whole:
            found = found | {STEP: (DENSE_STEP, [*found.get(STEP, ("", []))[1], *whole])}
        dense = _of_few_kinds(found, self.reasons)
        with _lock:
            self.forwards += 1
            self.sparse += calls
            for kind, (reason, modules) in dense.items():
                self.dense[kind] += len(modules)
                self.reasons[kind] = reason
            seen = calls + sum(len(modules) for _, modules in dense.values())
            self.unseen += max(0, len(processors) - seen)
            self.tilings = tilings or self.tilings
            if tally.sparse:
                self.implementation = "torch" if tally.obstacle else "triton"
                self.obstacle = tally.obstacle and tally.obstacle[1]
            is_new = bool(calls and tilings) and self._is_new_grid(tilings)
            untold = {reason: self._untold(kind, modules) for kind, (reason, modules) in dense.items()}
        for reason, modules in untold.items():
            if modules:
                logger.warning("%s runs dense: %s.", grouped(modules), reason)
        if is_new:
            level = logging.INFO if self._logged_grids <= LOGGED_GRIDS else logging.DEBUG
            choices = [
                {"combine": each.config.combine, "selection": each.config.selection} for each in processors.values()
            ]
            how = " or ".join(dict.fromkeys(map(as_arguments, choices)))
            served = served_by(self.implementation, self.obstacle)
            logger.log(level, "%s: %s; %s; %s.", label, told(tilings), how, served)

    def _is_new_grid(self, tilings: Sequence[Tiling]) -> bool:
        """Whether this one is not among the last; a ratio that changes from step to step makes no new one."""
        grids = tuple(dict.fromkeys((tiling.video_shape, tiling.block_size) for tiling in tilings))
        if grids in self._grids:
            return False
        self._grids[grids] = None
        self._logged_grids += 1
        while len(self._grids) > MOST_GRIDS:
            del self._grids[next(iter(self._grids))]
        return True

    def _untold(self, kind: str, modules: Sequence[str]) -> list[str]:
        """The modules of which it was not said yet; of `dense_steps` a line a run says it."""
        new = [] if kind == STEP else [name for name in dict.fromkeys(modules) if (kind, name) not in self._told]
        self._told.update((kind, name) for name in new)
        return new


def _dense_unseen(processors: Mapping[str, Any]) -> dict[str, tuple[str, list[str]]]:
    """Dense calls that were not seen, as those of compiled code, but follow from what the processors were told."""
    dense: dict[str, tuple[str, list[str]]] = {}
    for name, processor in processors.items():
        facts = processor.state.facts
        if facts.dense_step and not processor.keeps_coarse:
            dense.setdefault(STEP, (DENSE_STEP, []))[1].append(name)
        elif facts.grid is None:
            dense.setdefault(GRID, (facts.reason, []))[1].append(name)
    return dense


def _of_few_kinds(dense: Dense, known: Mapping[str, str]) -> Dense:
    """The same, with those kinds together as "other" that would be too many."""
    few: dict[str, tuple[str, list[str]]] = {}
    for kind, (reason, modules) in dense.items():
        key = kind if kind in known or len(known) < MOST_KINDS else OTHER
        few[key] = reason, [*few.get(key, ("", []))[1], *modules]
    return few


def told(tilings: Sequence[Tiling]) -> str:
    """Tilings in words; mostly they differ in nothing but what is kept."""
    grids: dict[tuple[Any, ...], list[Tiling]] = {}
    for tiling in tilings:
        grids.setdefault((tiling.video_shape, tiling.block_size, tiling.tiles), []).append(tiling)
    return "; ".join(
        f"grid {by(first.video_shape)}, {first.tokens} tokens in {first.tiles} tiles of {by(first.block_size)} "
        f"({first.padding:.0%} padding), of which each keeps {_kept(alike)}"
        for alike in grids.values()
        for first in alike[:1]
    )


def _kept(tilings: Sequence[Tiling]) -> str:
    least, most = (choose(tiling.kept for tiling in tilings) for choose in (min, max))
    share = f"{least / tilings[0].tiles:.0%}"
    return f"{least} ({share})" if least == most else f"{least} to {most} ({share} to {most / tilings[0].tiles:.0%})"


def served_by(implementation: str | None, obstacle: str | None) -> str:
    """An implementation in words."""
    if implementation is None:
        return obstacle or "not known before the first sparse call"
    return f"PyTorch, not the Triton kernels: {obstacle.rstrip('.')}" if obstacle else "Triton kernels"
