"""What is measured of one call of the operation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..operators import forward
from ..problem import Problem
from ..tiles import TileGrid, num_selected_tiles
from ..torch_impl import accumulator, context_key_mask
from .mass import selection_order, tile_mass

CURVE_RATIOS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
ENOUGH_MASS = 0.9
"""The mass by whose cost in tiles a layer's sharpness is told."""


@dataclass(frozen=True)
class Layer:
    """One video self-attention module of a pipeline.

    Args:
        part: the pipeline's component that it is in, such as "transformer".
        name: its own name there.
        position: its place among the video self-attention modules of that part, as `dense_layers` counts.
    """

    part: str
    name: str
    position: int


@dataclass(frozen=True)
class QueryTile:
    """What one query tile keeps, and where its mass is; both `[tiles]`, means over batch and heads, on the CPU.

    Args:
        tile: its number.
        kept: share of the heads that keep each key tile.
        mass: share of dense attention's softmax in each key tile.
    """

    tile: int
    kept: torch.Tensor
    mass: torch.Tensor


@dataclass(frozen=True)
class Observation:
    """One call of one layer. Masses are means over batch, heads and the sampled query tiles.

    Args:
        layer: which.
        step: the denoising step, from 0.
        run: which of the layer's calls in that step: guidance makes two, and so do some solvers.
        grid: the call's tiles.
        kept: number of key tiles that each query tile keeps.
        combine: how the branches become one output.
        selection: what key tiles are ranked by.
        mass: share of dense attention's softmax on what is attended exactly: kept tiles and context tokens.
        mass_of_heads: the same of every head.
        best_mass: what the same number of tiles could hold, were they chosen by their mass.
        context_mass: the part of `mass` on context tokens (text, reference frames).
        curve: `mass` at each of `CURVE_RATIOS`, in the order in which the selection would keep the tiles.
        best_curve: the same in order of the tiles' mass.
        needed: share of the tiles that hold 90 % of the mass, context included, in order of their mass.
        needed_by_selection: the same in the order of the selection.
        error: `||sparse - dense|| / ||dense||` of the attention's output at the video's tokens.
        query: of the chosen query, if its token is on this call's grid.
    """

    layer: Layer
    step: int
    run: int
    grid: TileGrid
    kept: int
    combine: str
    selection: str
    mass: float
    mass_of_heads: tuple[float, ...]
    best_mass: float
    context_mass: float
    curve: tuple[float, ...]
    best_curve: tuple[float, ...]
    needed: float
    needed_by_selection: float
    error: float
    query: QueryTile | None = None

    def to_dict(self) -> dict[str, Any]:
        """Numbers, text and lists, ready for JSON."""
        values = {name: value for name, value in vars(self).items() if name not in ("layer", "grid", "query")}
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        grid = {"video_shape": list(self.grid.video_shape), "block_size": list(self.grid.block_size)}
        query = None
        if self.query is not None:
            kept, mass = ([round(each, 5) for each in x.tolist()] for x in (self.query.kept, self.query.mass))
            query = {"tile": self.query.tile, "kept": kept, "mass": mass}
        return vars(self.layer) | grid | {"tiles": self.grid.num_tiles} | values | {"query": query}


@torch.no_grad()
def measure(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gate: torch.Tensor | None,
    context_mask: torch.Tensor | None,
    problem: Problem,
    implementation: str,
    tiles: torch.Tensor,
    query_tile: int | None,
    dense: torch.Tensor,
) -> dict[str, Any]:
    """The fields of an `Observation` that one call of the operation tells.

    Args:
        query, key, value, gate, context_mask, problem, implementation: the call, as `operators.forward` takes it.
        tiles: numbers of the query tiles to look at, ascending, int64 on the CPU.
        query_tile: number of one of them, of which all is kept.
        dense: what the call would return with every tile kept.
    """
    sparse, indices, _ = forward(query, key, value, gate, context_mask, problem, implementation)
    error = relative_error(sparse[:, problem.video], dense[:, problem.video])
    del sparse
    mass = tile_mass(query, key, problem, tiles, context_mask)
    of_tiles, context = mass[..., :-1], mass[..., -1:]
    order = selection_order(query, key, value, context_mask, problem, tiles)
    selected = indices[:, :, tiles.to(indices.device)].long()
    held = of_tiles.gather(-1, selected).sum(-1, keepdim=True) + context
    by_selection, best = (
        x.cumsum(-1) + context for x in (of_tiles.gather(-1, order), of_tiles.sort(-1, descending=True).values)
    )
    counts = torch.tensor([num_selected_tiles(problem.grid.num_tiles, ratio) - 1 for ratio in CURVE_RATIOS])
    chosen = None
    if query_tile is not None:
        place = int((tiles == query_tile).nonzero())
        kept = torch.zeros_like(of_tiles[:, :, place]).scatter_(-1, selected[:, :, place], 1.0)
        chosen = QueryTile(query_tile, kept.mean((0, 1)).cpu(), of_tiles[:, :, place].mean((0, 1)).cpu())
    return {
        "grid": problem.grid,
        "kept": problem.top_k,
        "combine": problem.combine,
        "selection": problem.selection,
        "mass": float(held.mean()),
        "mass_of_heads": tuple(held.mean((0, 2, 3)).tolist()),
        "best_mass": float(best[..., problem.top_k - 1].mean()),
        "context_mass": float(context.mean()),
        "curve": _at(by_selection, counts),
        "best_curve": _at(best, counts),
        "needed": _needed(best),
        "needed_by_selection": _needed(by_selection),
        "error": error,
        "query": chosen,
    }


@torch.no_grad()
def dense_output(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gate: torch.Tensor | None,
    context_mask: torch.Tensor | None,
    problem: Problem,
    implementation: str,
) -> torch.Tensor:
    """What the call would return with every tile kept: dense attention, and the coarse branch where that is added."""
    if problem.has_coarse:
        everything = replace(problem, top_k=problem.grid.num_tiles)
        return forward(query, key, value, gate, context_mask, everything, implementation)[0]
    rows = (x.transpose(1, 2) for x in (query, key, value))
    mask = context_key_mask(key, context_mask, problem)
    attended = torch.nn.functional.scaled_dot_product_attention(*rows, attn_mask=mask, scale=problem.scale)
    return attended.transpose(1, 2)


def sampled_tiles(num_tiles: int, count: int, seed: int, also: int | None) -> torch.Tensor:
    """Numbers of at most `count` query tiles, drawn without repetition, and one more if it is not among them."""
    drawn = set(torch.randperm(num_tiles, generator=torch.Generator().manual_seed(seed))[:count].tolist())
    return torch.tensor(sorted(drawn | ({also} if also is not None else set())))


def tile_of(token: Sequence[int], grid: TileGrid) -> int:
    """The number of the tile that holds a token `(t, h, w)` of the grid."""
    t, h, w = (position // block for position, block in zip(token, grid.block_size, strict=True))
    _, n_h, n_w = grid.tiles_per_axis
    return (t * n_h + h) * n_w + w


def _at(cumulated: torch.Tensor, counts: torch.Tensor) -> tuple[float, ...]:
    return tuple(cumulated.mean((0, 1, 2))[counts.to(cumulated.device)].tolist())


def _needed(cumulated: torch.Tensor) -> float:
    count = (cumulated < ENOUGH_MASS).sum(-1) + 1
    return float(count.clamp_max(cumulated.shape[-1]).double().mean()) / cumulated.shape[-1]


def relative_error(sparse: torch.Tensor, dense: torch.Tensor) -> float:
    """`||sparse - dense|| / ||dense||` over all of two tensors of one shape, batch first; 0 where dense is zero."""
    difference, norm = 0.0, 0.0
    exact = accumulator(dense.dtype)
    for ours, theirs in zip(sparse, dense, strict=True):  # an item at a time: these are copies
        theirs = theirs.to(exact)
        difference += float((ours.to(exact) - theirs).square().sum())
        norm += float(theirs.square().sum())
    return (difference / norm) ** 0.5 if norm else 0.0
