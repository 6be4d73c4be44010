"""Times that are expected, interpolated between those that were measured and ship in `measured.json`."""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from ..tiles import TileGrid
from .costs import Costs

GPUS = ("H100", "H200")
ROWS = 64  # of a query tile, however few tokens it has
KEYS = 16  # that the kernels take at a time
# By means, random tokens keep too many of the cheap tiles at the edges: their rows show no waste to be taken off.
_SHOWS_WASTE = "quarters"


@dataclass(frozen=True)
class Layer:
    """What one attention layer is expected to take.

    Args:
        dense_ms: the faster of PyTorch's flash and cuDNN attention.
        sparse_ms: by ratio.
        host_ms: what the host needs for a sparse call: no call is faster.
        origin: the rows that this comes from, in words.
        reach: how far from them it is, in words.
        measured: whether exactly this shape was measured.
    """

    dense_ms: float
    sparse_ms: dict[float, float]
    host_ms: float
    origin: str
    reach: str
    measured: bool

    def speedup(self, ratio: float) -> float:
        """Times as fast as dense."""
        return self.dense_ms / self.sparse_ms[ratio]


@functools.lru_cache(maxsize=1)
def measured() -> Mapping[str, Any]:
    """The distilled measurements, as `docs/make_planning.py` wrote them."""
    return json.loads(resources.files(__package__).joinpath("measured.json").read_text())


def waste(grid: TileGrid) -> float:
    """What the grid's tiles cost, as a multiple of what its tokens alone would: 1 where nothing is padded."""
    tiles, keys = 0, 0
    extents = zip(grid.video_shape, grid.block_size, strict=True)
    counts = [((extent // side, side), (1, extent % side)) for extent, side in extents]
    for parts in itertools.product(*counts):
        size = math.prod(side for _, side in parts)
        number = math.prod(number for number, _ in parts) if size else 0
        tiles, keys = tiles + number, keys + number * -(-size // KEYS) * KEYS
    return tiles * ROWS * keys / grid.num_tokens**2


def expected_layer(
    gpu: str, costs: Costs, batch: int, grid: TileGrid, fitted: bool, combine: str, ratios: Sequence[float]
) -> Layer:
    """One layer of this model on this grid.

    Between measured shapes the logarithm of the time per dense time is linear in that of the number of tiles, after
    taking off what tiles at the edges waste; between measured ratios it is linear in the ratio, and between measured
    head dimensions in these.

    Raises:
        ValueError: nothing was measured on `gpu`.
    """
    rows = _rows(gpu, fitted, combine)
    exact = next((row for row in rows if _is(row, costs, batch, grid)), None)
    if exact is not None:
        rows = [exact]
    by_dim = _by_head_dim(rows)
    dense_flops = 4.0 * batch * costs.width * grid.num_tokens**2
    rate = _between_dims(by_dim, costs.head_dim, _rate, grid)
    dense_ms = exact["dense_ms"] if exact else dense_flops / rate * 1e3
    sparse = {}
    for ratio in ratios:
        share = _between_dims(by_dim, costs.head_dim, functools.partial(_share, ratio=ratio), grid)
        shows = rows[0]["selection"] == _SHOWS_WASTE
        sparse[ratio] = dense_ms * share * (waste(grid) if shows else 1.0)
    host = min(row["host_ms"] for row in _rows(gpu, False, combine))
    sparse = {ratio: max(each, host) for ratio, each in sparse.items()}
    return Layer(dense_ms, sparse, host, _origin(rows, costs, grid), _reach(rows, costs, grid), exact is not None)


def other_seconds(gpu: str, costs: Costs, video_shape: tuple[int, int, int], batch: int, text_tokens: int) -> float:
    """What everything but video self-attention is expected to take in one forward, without `torch.compile`."""
    rest = measured()["rest"][gpu]
    flops = costs.other_flops(video_shape, batch, text_tokens)
    return rest["seconds_per_flop"] * flops + rest["seconds_per_element"] * costs.elements(video_shape, batch)


def measured_model(gpu: str, checkpoint: str, video_shape: tuple[int, int, int]) -> Mapping[str, Any] | None:
    """The row of this whole transformer on this grid, if it was measured on `gpu`."""
    return next(
        (
            row
            for row in measured()["models"]
            if (row["gpu"], row["checkpoint"], tuple(row["video_shape"])) == (gpu, checkpoint, video_shape)
        ),
        None,
    )


def _rows(gpu: str, fitted: bool, combine: str) -> list[dict[str, Any]]:
    """The rows nearest to what will run: by quarters for merge if there are some, with the same kind of block."""
    mine = [row for row in measured()["layers"] if row["gpu"] == gpu and row["combine"] == combine]
    if not mine:
        raise ValueError(f"gpu={gpu!r} has no measurements; there are some of {', '.join(GPUS)}.")
    wanted = [row for row in mine if row["selection"] == _SHOWS_WASTE and row["fitted"] == fitted]
    if not wanted:
        return [row for row in mine if row["selection"] == "mean" and not row["fitted"]]
    # What fits the grid anyway was measured once.
    shapes = {row["shape"] for row in wanted}
    whole = [row for row in mine if row["selection"] == _SHOWS_WASTE and row["shape"] not in shapes]
    return wanted + [row for row in whole if waste(_grid(row)) == 1.0]


def _is(row: Mapping[str, Any], costs: Costs, batch: int, grid: TileGrid) -> bool:
    mine = (grid.video_shape, grid.block_size, batch, costs.heads, costs.head_dim)
    block = tuple(row["block"])
    return mine == (tuple(row["video_shape"]), block, row["batch"], row["heads"], row["head_dim"])


def _grid(row: Mapping[str, Any]) -> TileGrid:
    return TileGrid(tuple(row["video_shape"]), tuple(row["block"]))


def _rate(row: Mapping[str, Any]) -> float:
    """FLOPs a second of dense attention."""
    flops = 4.0 * row["batch"] * row["heads"] * row["head_dim"] * math.prod(row["video_shape"]) ** 2
    return flops / row["dense_ms"] * 1e3


def _share(row: Mapping[str, Any], ratio: float) -> float:
    """Sparse time over dense time at a ratio, without what the edges waste; linear between measured ratios."""
    points = sorted((float(each), 1 / speedup) for each, speedup in row["speedups"].items())
    pairs = list(itertools.pairwise(points))
    (a, x), (b, y) = next((pair for pair in pairs if ratio <= pair[1][0]), pairs[-1])
    share = max(x + (y - x) * (ratio - a) / (b - a), x * ratio / a if ratio < a else 0.0)
    return share / (waste(_grid(row)) if row["selection"] == _SHOWS_WASTE else 1.0)


def _by_head_dim(rows: Sequence[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    return {dim: [row for row in rows if row["head_dim"] == dim] for dim in sorted({row["head_dim"] for row in rows})}


def _between_dims(
    by_dim: dict[int, list[dict[str, Any]]], dim: int, value: Callable[[dict[str, Any]], float], grid: TileGrid
) -> float:
    """`value` at this head_dim and number of tiles; a head_dim with one shape changes with tiles as the best known."""
    best = max(by_dim.values(), key=len)

    def at(rows: list[dict[str, Any]]) -> float:
        if len(rows) > 1:
            return _between_tiles(rows, value, grid.num_tiles)
        own = value(rows[0])
        if rows is best:
            return own
        change = _between_tiles(best, value, grid.num_tiles) / _between_tiles(best, value, _grid(rows[0]).num_tiles)
        return own * change

    dims = list(by_dim)
    below = max((each for each in dims if each <= dim), default=dims[0])
    above = min((each for each in dims if each >= dim), default=dims[-1])
    if below == above:
        return at(by_dim[below])
    weight = (dim - below) / (above - below)
    return (1 - weight) * at(by_dim[below]) + weight * at(by_dim[above])


def _between_tiles(rows: list[dict[str, Any]], value: Callable[[dict[str, Any]], float], tiles: int) -> float:
    """Log-linear between the nearest shapes; beyond the first and last as at these."""
    points = sorted((_grid(row).num_tiles, value(row)) for row in rows)
    if tiles <= points[0][0]:
        return points[0][1]
    for (a, x), (b, y) in itertools.pairwise(points):
        if tiles <= b:
            weight = math.log(tiles / a) / math.log(b / a)
            return math.exp((1 - weight) * math.log(x) + weight * math.log(y))
    return points[-1][1]


def _neighbours(rows: Sequence[dict[str, Any]], costs: Costs, grid: TileGrid) -> list[dict[str, Any]]:
    """The measured shapes on both sides of this number of tiles, of the nearest head_dim."""
    near = min({row["head_dim"] for row in rows}, key=lambda dim: abs(dim - costs.head_dim))
    mine = sorted((row for row in rows if row["head_dim"] == near), key=lambda row: _grid(row).num_tiles)
    below = [row for row in mine if _grid(row).num_tiles <= grid.num_tiles]
    above = [row for row in mine if _grid(row).num_tiles >= grid.num_tiles]
    found = [*below[-1:], *above[:1]]
    return found if len(found) < 2 or found[0] is not found[1] else found[:1]


def _origin(rows: Sequence[dict[str, Any]], costs: Costs, grid: TileGrid) -> str:
    near = _neighbours(rows, costs, grid)
    names = " and ".join(f"{row['shape']} ({_grid(row).num_tiles} tiles, head_dim {row['head_dim']})" for row in near)
    first = near[0]
    how = f"tiles selected by {first['selection'] + ('s' if first['selection'] == 'mean' else '')}"
    files = ", ".join(dict.fromkeys(row["file"] for row in near))
    return f"{names} on one {first['device']}, Triton {first['triton']}, {first['date']}, {how}; {files}"


def _reach(rows: Sequence[dict[str, Any]], costs: Costs, grid: TileGrid) -> str:
    """Whether this is between measured shapes, or how far beyond."""
    if len(rows) == 1 and _grid(rows[0]).num_tiles == grid.num_tiles:
        return "measured"
    counts = sorted(_grid(row).num_tiles for row in rows)
    dims = sorted({row["head_dim"] for row in rows})
    beyond = []
    if grid.num_tiles < counts[0]:
        beyond.append(f"{counts[0] / grid.num_tiles:.1f} times fewer tiles than were measured ({counts[0]})")
    if grid.num_tiles > counts[-1]:
        beyond.append(f"{grid.num_tiles / counts[-1]:.1f} times as many tiles as were measured ({counts[-1]})")
    if costs.head_dim not in dims:
        beyond.append(f"head_dim {costs.head_dim}, where {' and '.join(map(str, dims))} were measured")
    return f"extrapolated: {'; '.join(beyond)}" if beyond else "interpolated"
