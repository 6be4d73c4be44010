"""The token grid of a video cut into 3D tiles: sizes, order, and how many tiles a query tile keeps."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from numbers import Real

import torch

MAX_TILE_TOKENS = 128
REALS = (Real, torch.SymInt, torch.SymFloat)
UNORDERED = (str, bytes, Set, Mapping)  # which can be iterated, but not as a sequence of numbers


@dataclass(frozen=True)
class TileGrid:
    """A `(T, H, W)` grid of video tokens, cut into tiles of `(t, h, w)` tokens.

    Tiles are numbered t-major, `(t_tile * n_h + h_tile) * n_w + w_tile`, and so are the tokens inside a tile. Tiles at
    the far edges hold fewer tokens when the block size does not divide the video shape.
    """

    video_shape: tuple[int, int, int]
    block_size: tuple[int, int, int]

    @property
    def tiles_per_axis(self) -> tuple[int, int, int]:
        (T, H, W), (t, h, w) = self.video_shape, self.block_size
        return (-(-T // t), -(-H // h), -(-W // w))

    @property
    def num_tiles(self) -> int:
        n_t, n_h, n_w = self.tiles_per_axis
        return n_t * n_h * n_w

    @property
    def num_tokens(self) -> int:
        T, H, W = self.video_shape
        return T * H * W

    @property
    def tile_capacity(self) -> int:
        t, h, w = self.block_size
        return t * h * w

    @property
    def padding(self) -> float:
        """Share of a padded layout that would hold no token, from 0 (nothing wasted) up."""
        return 1 - self.num_tokens / (self.num_tiles * self.tile_capacity)

    def token_index(self, device: torch.device | str | None = None) -> torch.Tensor:
        """Position in the sequence of every tile slot: int64 `[num_tiles, tile_capacity]`, -1 where a slot is empty."""
        axes = []
        for extent, block, tiles in zip(self.video_shape, self.block_size, self.tiles_per_axis, strict=True):
            position = torch.arange(tiles * block, device=device).reshape(tiles, block)
            axes.append(torch.where(position < extent, position, -1))
        t, h, w = axes
        t, h, w = t[:, None, None, :, None, None], h[None, :, None, None, :, None], w[None, None, :, None, None, :]
        _, H, W = self.video_shape
        index = torch.where((t < 0) | (h < 0) | (w < 0), -1, (t * H + h) * W + w)
        return index.reshape(self.num_tiles, self.tile_capacity)


def num_selected_tiles(num_tiles: int, top_k_ratio: float) -> int:
    """Key tiles that a query tile keeps: `ceil(top_k_ratio * num_tiles)`, at least 1 and at most all.

    The small slack undoes float error such as `0.1 * 30 = 3.0000000000000004`.
    """
    return min(num_tiles, max(1, math.ceil(top_k_ratio * num_tiles - 1e-9 * num_tiles)))


def num_kept_tiles(grid: TileGrid, top_k: int | None, top_k_ratio: float) -> int:
    """Key tiles that a query tile keeps on this grid: `top_k` of them if it is given, else by the ratio."""
    if top_k is None:
        return num_selected_tiles(grid.num_tiles, top_k_ratio)
    return min(top_k, grid.num_tiles)


def settle(
    video_shape: Sequence[int], block_size: Sequence[int] | str, top_k_ratio: float = 0.5, top_k: int | None = None
) -> tuple[tuple[int, int, int], int]:
    """The block size and the number of kept tiles that `video_sparse_attention` comes to, for use outside of a graph.

    Both may be passed to it in place of what they were made from. Taken from the sizes of a tensor, they are no numbers
    that a compiled graph is bound to.

    Raises:
        ValueError: an argument is not as `video_sparse_attention` takes it.
    """
    video_shape = check_video_shape(video_shape)
    top_k = check_top_k(top_k, top_k_ratio)
    if isinstance(block_size, str) and block_size == "auto":
        block_size = fitting_block_size(video_shape)
    grid = TileGrid(video_shape, check_block_size(block_size))
    return grid.block_size, num_kept_tiles(grid, top_k, top_k_ratio)


def check_top_k(top_k: int | None, top_k_ratio: float) -> int | None:
    """`top_k` as an int or `None`; `ValueError` unless it is at least 1 (or None) and `top_k_ratio` in (0, 1]."""
    count = None
    if top_k is not None:
        count = whole(top_k)
        if count is None or count < 1:
            raise ValueError(f"top_k={top_k!r} must be a whole number of tiles, at least 1.")
    if not is_real(top_k_ratio) or not 0 < top_k_ratio <= 1:
        raise ValueError(f"top_k_ratio={top_k_ratio!r} must be in (0, 1]: the share of key tiles kept, such as 0.2.")
    return count


def is_real(number: object) -> bool:
    """Whether this is a real number of any kind; neither truth values nor tensors are."""
    return type(number) is float or (isinstance(number, REALS) and not isinstance(number, bool))


def whole(number: object) -> int | None:
    """A whole number of any kind as an int; `None` for all else, truth values and text included.

    Symbols of a compiler stay symbols.
    """
    if type(number) is int:
        return number
    if isinstance(number, torch.Tensor):
        number = number.item() if number.ndim == 0 else None
    if isinstance(number, bool):
        return None
    if isinstance(number, (int, torch.SymInt)):
        return number
    if isinstance(number, Real) and math.isfinite(number) and number % 1 == 0:
        return int(number)  # type: ignore[call-overload]
    return None


def fitting_block_size(video_shape: Sequence[int], most_tokens: int = 64) -> tuple[int, int, int]:
    """The block of at most `most_tokens` tokens that costs least on this grid; of equal ones, the most compact.

    A query tile costs `most_tokens` rows however many it has, a key tile its tokens rounded up to 16. Sides are 2 to 8
    tokens, none more than twice another, but a side may always span its whole axis.
    """
    best = None
    video_shape = check_video_shape(video_shape)
    axes = [sorted({*range(2, min(8, extent) + 1), min(extent, 8)}) for extent in video_shape]
    for block in itertools.product(*axes):
        free = [side for side, extent in zip(block, video_shape, strict=True) if side < extent]
        if math.prod(block) > most_tokens or (free and max(free) > 2 * min(free)):
            continue
        tiles, keys = 0, 0
        # Along each axis: how many tiles have which extent.
        counts = [((extent // side, side), (1, extent % side)) for extent, side in zip(video_shape, block, strict=True)]
        for parts in itertools.product(*counts):
            size = math.prod(side for _, side in parts)
            count = math.prod(number for number, _ in parts) if size else 0
            tiles, keys = tiles + count, keys + count * -(-size // 16) * 16
        candidate = (tiles * keys, sum(1 / side for side in block), block)
        best = min(best or candidate, candidate)
    assert best is not None
    return best[2]


def check_block_size(block_size: Sequence[int] | str) -> tuple[int, int, int]:
    """The block size as a tuple of three ints, or a `ValueError` that says what is wrong with it."""
    sizes = _three_positive_integers("block_size", block_size, "(4, 4, 4)")
    if math.prod(sizes) > MAX_TILE_TOKENS:
        raise ValueError(
            f"block_size={sizes} makes tiles of {math.prod(sizes)} tokens; at most {MAX_TILE_TOKENS} are supported. "
            "Choose a smaller block, for example (4, 4, 4)."
        )
    return sizes


def check_video_shape(video_shape: Sequence[int] | None) -> tuple[int, int, int]:
    """The video shape as a tuple of three ints, or a `ValueError` that says what is wrong with it."""
    if video_shape is None:
        raise ValueError(
            "video_shape must be set: pass the (T, H, W) grid of video tokens after patchification, for example "
            "video_shape=(21, 30, 52) for 81 frames of 480x832 in Wan, or call enable_vsa(pipe), which reads it from "
            "the transformer's own inputs."
        )
    return _three_positive_integers("video_shape", video_shape, "(21, 30, 52)")


def _three_positive_integers(name: str, value: object, example: str) -> tuple[int, int, int]:
    sizes = whole_numbers(value, 3, 1)
    if sizes is None:
        raise ValueError(f"{name}={value!r} must be three positive integers, for example {name}={example}.")
    first, second, third = sizes
    return first, second, third


def whole_numbers(value: object, count: int, least: int) -> tuple[int, ...] | None:
    """So many whole numbers, each at least `least`, as ints; `None` if `value` is anything else or has no order."""
    if type(value) is not tuple and (isinstance(value, UNORDERED) or not isinstance(value, Iterable)):
        return None
    try:
        numbers = tuple(value)
    except TypeError:  # a tensor or an array without axes
        return None
    if len(numbers) != count:
        return None
    sizes = tuple(whole(number) for number in numbers)
    return None if any(size is None or size < least for size in sizes) else sizes  # type: ignore[return-value]
