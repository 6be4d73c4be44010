"""Exact attention mass: what dense attention's softmax gives to every key tile."""

from __future__ import annotations

import torch

from ..problem import Problem
from ..torch_impl import Tiled, accumulator, context_key_mask

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
    index = problem.grid.token_index(query.device)
    column = torch.full((sequence,), count, device=query.device)
    for_slots = torch.arange(count, device=query.device)[:, None].expand_as(index)
    column[index[index >= 0] + problem.before] = for_slots[index >= 0]
    mask = context_key_mask(key, context_mask, problem)
    mass = torch.zeros(batch, heads, len(tiles), count + 1, device=query.device, dtype=dtype)
    row_bytes = batch * sequence * problem.grid.tile_capacity * mass.element_size() * 2
    step = max(1, MAX_BYTES // row_bytes)
    for first in range(0, heads, step):
        some = slice(first, first + step)
        keys = key[:, :, some].to(dtype).permute(0, 2, 3, 1)
        for number, tile in enumerate(tiles.tolist()):
            rows = index[tile][index[tile] >= 0] + problem.before
            logits = query[:, rows, some].to(dtype).transpose(1, 2) @ keys * problem.scale
            if mask is not None:
                logits = logits.masked_fill(~mask, -torch.inf)
            mass[:, some, number].index_add_(2, column, logits.softmax(-1).mean(2))
    return mass


def selection_order(tiled: Tiled, query: torch.Tensor, key: torch.Tensor, tiles: torch.Tensor) -> torch.Tensor:
    """All key tiles in the order in which some query tiles would keep them, int64 `[batch, heads, sampled, tiles]`.

    Args:
        tiled: of the call.
        query: `[batch, sequence, heads, head_dim]`.
        key: likewise.
        tiles: numbers of the query tiles, int64 `[sampled]`, ascending.
    """
    rows, first = [], 0
    for scores in tiled.scores(query, key):
        inside = tiles[(tiles >= first) & (tiles < first + scores.shape[2])] - first
        rows.append(scores[:, :, inside.to(scores.device)])
        first += scores.shape[2]
    return torch.cat(rows, 2).argsort(dim=-1, descending=True)
