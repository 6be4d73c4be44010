"""Exact attention mass: what dense attention's softmax gives to every key tile."""

from __future__ import annotations

import torch

from ..problem import Problem
from ..torch_impl import Layout, Tiled, accumulator, context_key_mask, part_of, parts

MAX_BYTES = 2**28
"""Of the logits that are held at once, or those of one head and query tile if that is more."""


def tile_mass(
    query: torch.Tensor, key: torch.Tensor, problem: Problem, tiles: torch.Tensor, context_mask: torch.Tensor | None
) -> torch.Tensor:
    """The share of dense attention's softmax that falls into every key tile, for some query tiles.

    Args:
        query: `[batch, sequence, heads, head_dim]`.
        key: likewise.
        problem: gives grid, scale and context; how many tiles are kept does not matter.
        tiles: numbers of the query tiles, int64 `[sampled]`, on any device.
        context_mask: bool `[batch, context]`, False where a context key is padding.

    Returns:
        `[batch, heads, sampled, tiles + 1]` in fp32 (fp64 for fp64 inputs), means over each query tile's tokens. The
        last column is the mass on context tokens, and each row sums to 1.
    """
    batch, sequence, heads, _ = query.shape
    dtype, count = accumulator(query.dtype), problem.grid.num_tiles
    layout = Layout(problem, query.device, dtype)
    column = torch.full((sequence,), count, device=query.device)
    column[problem.video] = layout.tile_of_token
    mask = context_key_mask(key, context_mask, problem)
    mass = torch.zeros(batch, heads, len(tiles), count + 1, device=query.device, dtype=dtype)
    row_bytes = batch * sequence * problem.grid.tile_capacity * mass.element_size() * 2
    step = max(1, MAX_BYTES // row_bytes)
    for first in range(0, heads, step):
        some = slice(first, first + step)
        keys = key[:, :, some].to(dtype).permute(0, 2, 3, 1)
        for number, tile in enumerate(tiles.tolist()):
            rows = layout.index[tile][layout.valid[tile]]
            logits = query[:, rows, some].to(dtype).transpose(1, 2) @ keys * problem.scale
            if mask is not None:
                logits = logits.masked_fill(~mask, -torch.inf)
            mass[:, some, number].index_add_(2, column, logits.softmax(-1).mean(2))
    return mass


def selection_order(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    context_mask: torch.Tensor | None,
    problem: Problem,
    tiles: torch.Tensor,
) -> torch.Tensor:
    """All key tiles in the order in which some query tiles would keep them, int64 `[batch, heads, sampled, tiles]`.

    Args:
        query, key, value, context_mask, problem: the call, as `torch_impl.forward` takes it.
        tiles: numbers of the query tiles, int64 `[sampled]`, ascending.
    """
    layout = Layout(problem, query.device, accumulator(query.dtype))
    shape = query.shape[0], query.shape[2], len(tiles), problem.grid.num_tiles
    order = torch.empty(shape, dtype=torch.int64, device=query.device)
    for items, heads in parts(query):
        mask = None if context_mask is None else context_mask[items]
        q, k, v = (part_of(x, items, heads) for x in (query, key, value))
        tiled = Tiled(q, k, v, mask, layout)
        rows, first = [], 0
        for scores in tiled.scores():
            inside = tiles[(tiles >= first) & (tiles < first + scores.shape[2])] - first
            rows.append(scores[:, :, inside.to(scores.device)])
            first += scores.shape[2]
        order[items, heads] = torch.cat(rows, 2).argsort(dim=-1, descending=True)
    return order
