"""What one forward means for the modules of one config: the grid, its tiles, and how many of them are kept."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

from .schedule import share_of
from .steps import Position
from .tiles import TileGrid, fitting_block_size, num_kept_tiles

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Facts:
    """What one forward means for all modules of one config.

    Args:
        grid: `(T, H, W)`, or `None` where the transformer's inputs do not tell.
        block_size: the tiles' extents, "auto" resolved.
        kept: number of key tiles that each query tile keeps.
        dense_step: whether this denoising step is dense, by `dense_steps` or by the schedule.
        reason: why there is no grid.
        segments: numbers of the rows before the video, by kind, in families whose coarse branch has tiles of them.
    """

    grid: Grid | None = None
    block_size: Grid | None = None
    kept: int | None = None
    dense_step: bool = False
    reason: str = "no hooks of the transformer ran that read the grid; call the transformer itself, with VSA enabled"
    segments: tuple[int, ...] | None = None


NOTHING = Facts()
UNREADABLE = "the video shape could not be read from the transformer's inputs; pass video_shape="


def facts_of(processor: Any, grid: Grid | None, reason: str | None, position: Position | None) -> Facts:
    """What one forward means for a processor; its config's own grid comes first.

    Raises:
        ValueError: that grid has another number of tokens than the one read, in a family where attention cannot tell,
            since it sees other tokens beside the video's.
    """
    config = processor.config
    asked, read = (math.prod(shape) if shape else None for shape in (config.video_shape, grid))
    if asked and read and asked != read and processor.surplus is not None:
        raise ValueError(
            f"{processor.name or 'attention'}: video_shape={config.video_shape} has {asked} tokens, but the "
            f"transformer's inputs say {grid}, which has {read}; pass the (T, H, W) grid after patchification, or "
            "leave video_shape out, which is then read from these inputs."
        )
    grid = config.video_shape or grid
    ratio, is_dense = share_of(config.schedule, config.top_k_ratio, config.dense_steps, position)
    if grid is None:
        return Facts(dense_step=is_dense, reason=reason or UNREADABLE)
    tiled_grid = processor.tiled_grid(grid)
    block = _fitting_block_size(tiled_grid) if isinstance(config.block_size, str) else config.block_size
    tiles = TileGrid(tiled_grid, block)
    whole = processor.keeps_coarse and (is_dense or processor.stays_dense)
    kept = tiles.num_tiles if whole else num_kept_tiles(tiles, config.top_k, ratio)
    return Facts(grid, block, kept, is_dense)


_fitting_block_size = functools.lru_cache(maxsize=256)(fitting_block_size)
