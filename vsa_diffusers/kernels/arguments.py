"""What several kernels are passed: sizes, strides, lists and copies, in the order of their arguments."""

from __future__ import annotations

import functools

import torch

from ..problem import Problem
from ..tiles import TileGrid
from .buffers import PooledTiles, SelectedTiles
from .plans import Launch
from .primitives.tile_lists import GROUP
from .recording import TensorForm


def power_of_two(number: int) -> int:
    """The least power of two that is at least `number`, and at least 16, the least that a matrix instruction takes."""
    return max(16, 1 << (number - 1).bit_length())


def grid_arguments(grid: TileGrid) -> tuple[object, ...]:
    """Video shape, tiles along height and width, and block size, as the kernels take them.

    One by one: Triton makes variants of a kernel for the numbers in a tuple, whatever `do_not_specialize` says. Inside,
    the first five are the tuple `grid`.
    """
    return (*grid.video_shape, *grid.tiles_per_axis[1:], grid.block_size)


def list_arguments(pooled: PooledTiles, lists: SelectedTiles) -> tuple[torch.Tensor | None, ...]:
    """What both sparse kernels walk: from `full_tile_starts` to `max_norm`, in the order of their arguments."""
    walked = (lists.full_tile_starts, lists.partial_groups, lists.list_lengths, lists.selected_bits)
    return (*walked, pooled.pooled_kv, pooled.log_size, pooled.max_norm)


def strides(*tensors: torch.Tensor | None, missing: torch.Tensor | None = None) -> list[int]:
    """Strides of batch, sequence and heads of each tensor, those of `missing` for one that is not given."""
    given = [missing if x is None else x for x in tensors]
    return [stride for x in given if x is not None for stride in x.stride()[:3]]


def size_arguments(query: torch.Tensor, lists: SelectedTiles, problem: Problem) -> tuple[int, ...]:
    """How large it is: from `heads` to `bits_width`, in the order of their arguments."""
    batch, _, heads, _ = query.shape
    widths = (0 if x is None else x.shape[3] for x in (lists.partial_groups, lists.selected_bits))
    return (heads, batch * heads, problem.grid.num_tiles, problem.top_k, *widths)


def tiled_sources(rows: torch.Tensor | None, launch: Launch) -> tuple[object, ...]:
    """The two tensors of a tile-ordered copy `[2, P, V, D]`, then their descriptors for the rows of one step."""
    if rows is None:
        return None, None, None, None
    first, second = rows.unbind(0)
    if launch.layout != "descriptor":
        return first, second, None, None
    from triton.tools.tensor_descriptor import TensorDescriptor

    box = [1, launch.keys, power_of_two(rows.shape[-1])]
    return first, second, *(TensorDescriptor.from_tensor(x, box) for x in (first, second))


def has_boxes(x: TensorForm, grid: TileGrid) -> bool:
    """Whether tensor descriptors can see the tiles of `[B, S, H, D]` as boxes.

    They can where tiles have 64 tokens and sides that are powers of two, and heads lie side by side.
    """
    return (
        grid.tile_capacity == 64
        and all(side & (side - 1) == 0 for side in grid.block_size)
        and (x.stride[2] == x.shape[3] or x.shape[2] == 1)
        and all(stride > 0 and stride % 8 == 0 for stride in x.stride[:2])
        and x.misalignment == 0
    )


def group_constants(grid: TileGrid) -> dict[str, int]:
    """What the kernels that write lists must know of partial tiles: how many groups the largest makes."""
    return {"MAX_GROUPS": -(-(grid.tile_capacity - 1) // GROUP), "GROUP": GROUP}


@functools.lru_cache(maxsize=256)
def partial_width(problem: Problem) -> int:
    """The most groups that the partial tiles of one list can have; 0 where every tile is full."""
    grid = problem.grid
    sizes, full = {1}, 1
    for extent, block, tiles in zip(grid.video_shape, grid.block_size, grid.tiles_per_axis, strict=True):
        last = extent - (tiles - 1) * block
        sizes = {size * choice for size in sizes for choice in ({last} if tiles == 1 else {block, last})}
        full *= extent // block
    largest = max((size for size in sizes if size < grid.tile_capacity), default=0)
    return -(-largest // GROUP) * min(problem.top_k, grid.num_tiles - full)


def full_tiles_and_groups(problem: Problem) -> tuple[int, int]:
    """Full tiles of the grid, and the groups that all its partial tiles make together."""
    grid = problem.grid
    kinds = [(1, 1)]  # (tokens of a tile, how many tiles have them), one axis after another
    for extent, block in zip(grid.video_shape, grid.block_size, strict=True):
        sides = [(block, extent // block), (extent % block, 1)]
        kinds = [(size * side, count * times) for size, count in kinds for side, times in sides if side * times]
    full = sum(count for size, count in kinds if size == grid.tile_capacity)
    return full, sum(-(-size // GROUP) * count for size, count in kinds if size < grid.tile_capacity)
