"""Video Sparse Attention in PyTorch: runs anywhere, skips the work of unselected tiles, bounds its memory.

Query tiles are handled a chunk at a time: the tokens of the selected tiles are gathered into one row of keys per query
tile, and `scaled_dot_product_attention` does the rest, accumulating in fp32.

Shapes: B batch, H heads, S tokens, D head_dim, N tiles, C tile capacity, K selected tiles, c tiles of a chunk,
R = B * H * c rows, E extra keys (context tokens, and in "merge" mode the pooled tiles), L = K * C + E keys of a row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from .problem import Problem
from .selection import MIN_CHUNK_BYTES, mean_scores, quarter_scores, quarters, select_tiles


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gate: torch.Tensor | None,
    context_mask: torch.Tensor | None,
    problem: Problem,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output `[B, S, H, D]` and the selected tiles `[B, H, N, K]` (int32, ascending)."""
    tiled = Tiled(query, key, value, context_mask, problem)
    indices = select_tiles(tiled.scores(query, key), problem.top_k)
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    for tiles in tiled.chunks():
        selected = indices[:, :, tiles]
        rows = F.scaled_dot_product_attention(
            tiled.tokens(query, tiles)[:, None],
            tiled.row_keys(tiled.key_tiles, tiled.extra_key, selected)[:, None],
            tiled.row_keys(tiled.value_tiles, tiled.extra_value, selected)[:, None],
            attn_mask=tiled.bias(selected, query.dtype),
            scale=problem.scale,
        )
        tiled.put_tokens(output, rows, tiles)
    if problem.has_coarse:
        _add_coarse(output, gate, tiled)
    if problem.num_context:
        mask = context_key_mask(key, context_mask, problem)
        rows = F.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (context_of(query, problem), key, value)), attn_mask=mask, scale=problem.scale
        ).transpose(1, 2)
        output[:, : problem.before] = rows[:, : problem.before]
        output[:, problem.video.stop :] = rows[:, problem.before :]
    return output, indices


class Tiled:
    """The inputs cut into tiles: key and value copied in tile order, the means, and the extra keys of every row."""

    def __init__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        context_mask: torch.Tensor | None,
        problem: Problem,
    ):
        self.problem, grid = problem, problem.grid
        index = grid.token_index(query.device)  # [N, C]
        self.valid = index >= 0
        # An empty slot reads its tile's first token: finite, and masked out of every softmax.
        self.index = torch.where(self.valid, index, index[:, :1]) + problem.before
        self.sizes = self.valid.sum(1)
        share = self.valid.to(accumulator(key.dtype)) / self.sizes[:, None]
        self.mean_query, self.mean_key, self.mean_value = (self._means(x, share) for x in (query, key, value))
        self.key_tiles, self.value_tiles = (self._tiles(x) for x in (key, value))  # [B * H * N, C * D]
        self.extra_key, self.extra_value, self.extra_bias = self._extra(key, value, context_mask)
        token_bytes = key.shape[0] * key.shape[2] * key.shape[3] * key.element_size() * 2
        per_tile = token_bytes * (problem.top_k * grid.tile_capacity + self.extra_key.shape[2])
        budget = max(MIN_CHUNK_BYTES, token_bytes * grid.num_tokens // 16)
        self._chunk = max(1, budget // per_tile)

    def scores(self, query: torch.Tensor, key: torch.Tensor) -> Iterator[torch.Tensor]:
        """What the key tiles are selected by, `[B, H, c, N]` for one chunk of query tiles after another."""
        scale = self.problem.scale
        if self.problem.selection == "mean":
            return mean_scores(self.mean_query, self.mean_key, scale)
        members = quarters(self.valid, self.problem.grid)
        counts = members.sum(1)
        share = members.to(self.mean_key.dtype) / counts[:, None].clamp_min(1)
        return quarter_scores(self._means(query, share), self._means(key, share), counts, scale)

    def chunks(self) -> Iterator[slice]:
        """Ranges of query tiles whose gathered keys are about a sixteenth of key and value, or one tile."""
        for start in range(0, self.problem.grid.num_tiles, self._chunk):
            yield slice(start, min(start + self._chunk, self.problem.grid.num_tiles))

    def tokens(self, x: torch.Tensor, tiles: slice) -> torch.Tensor:
        """The tokens of a chunk's tiles: `[B, S, H, D]` to `[R, C, D]`; empty slots repeat a valid token."""
        rows = self.index[tiles]
        return x.index_select(1, rows.flatten()).unflatten(1, rows.shape).movedim(3, 1).flatten(0, 2)

    def put_tokens(self, x: torch.Tensor, rows: torch.Tensor, tiles: slice) -> None:
        """The inverse of `tokens`: write the valid slots of `rows` into `x` `[B, S, H, D]`."""
        batch, _, heads, dim = x.shape
        valid = self.valid[tiles].flatten()
        rows = rows.reshape(batch, heads, -1, dim)[:, :, valid].transpose(1, 2)
        x.index_copy_(1, self.index[tiles].flatten()[valid], rows.to(x.dtype))

    def selected_rows(self, selected: torch.Tensor) -> torch.Tensor:
        """Rows of `key_tiles` that hold the selected tiles `[B, H, c, K]`, flattened."""
        batch, heads = selected.shape[:2]
        offset = torch.arange(batch * heads, device=selected.device).reshape(batch, heads, 1, 1)
        return (selected + offset * self.problem.grid.num_tiles).flatten()

    def row_keys(self, tiles: torch.Tensor, extra: torch.Tensor, selected: torch.Tensor) -> torch.Tensor:
        """Keys or values that each query tile of a chunk sees, `[R, L, D]`: its selected tiles, then the extra ones."""
        batch, heads, count, _ = selected.shape
        dim = extra.shape[-1]
        rows = tiles.index_select(0, self.selected_rows(selected)).reshape(batch * heads * count, -1, dim)
        if not extra.shape[2]:
            return rows
        extra = extra[:, :, None].expand(-1, -1, count, -1, -1).reshape(batch * heads * count, -1, dim)
        return torch.cat([rows, extra], 1)

    def bias(self, selected: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
        """Additive mask `[R, 1, 1, L]`: empty slots, padded context, and pooled tiles already selected."""
        batch, heads, count, _ = selected.shape
        if self.problem.grid.padding == 0 and self.extra_bias is None:
            return None
        slots = torch.zeros(self.valid.shape, device=selected.device, dtype=dtype).masked_fill_(~self.valid, -math.inf)
        bias = [slots[selected.long()].flatten(3)]
        if self.extra_bias is not None:
            extra = self.extra_bias.to(dtype)[:, None, None].expand(batch, heads, count, -1)
            if self.problem.combine == "merge":  # a copy: of one head and one tile, `extra` is the bias itself
                extra = extra.scatter(-1, selected.long() + self.problem.num_context, -math.inf)
            bias.append(extra)
        return torch.cat(bias, -1).reshape(batch * heads * count, 1, 1, -1)

    def coarse(self) -> torch.Tensor:
        """Attention between tiles, `[B, H, N, D]` in fp32 (fp64 for fp64 inputs)."""
        return F.scaled_dot_product_attention(self.mean_query, self.mean_key, self.mean_value, scale=self.problem.scale)

    def spread(self, per_tile: torch.Tensor) -> torch.Tensor:
        """Give every video token its tile's value: `[B, H, N, D]` to `[B, T*H*W, H, D]`."""
        tile = torch.arange(len(self.index), device=self.index.device)[:, None].expand_as(self.index)
        tile_of_token = torch.empty(self.problem.grid.num_tokens, device=tile.device, dtype=torch.long)
        tile_of_token[(self.index - self.problem.before)[self.valid]] = tile[self.valid]
        return per_tile.transpose(1, 2).index_select(1, tile_of_token)

    def _extra(self, key, value, context_mask):
        """Keys that every query tile sees: context tokens, then (merge) one pooled key per tile of weight its size."""
        problem = self.problem
        keys, values = ([context_of(x, problem).transpose(1, 2)] for x in (key, value))
        bias = torch.zeros(key.shape[0], problem.num_context, device=key.device, dtype=self.mean_key.dtype)
        if context_mask is not None:
            bias = bias.masked_fill(~context_mask, -math.inf)
        if problem.combine == "merge":
            keys.append(self.mean_key.to(key.dtype))
            values.append(self.mean_value.to(value.dtype))
            bias = torch.cat([bias, self.sizes.to(bias.dtype).log().expand(key.shape[0], -1)], 1)
        needed = context_mask is not None or problem.combine == "merge" or problem.grid.padding > 0
        return torch.cat(keys, 2), torch.cat(values, 2), bias if needed else None

    def _means(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Sums over each tile's slots by their `weight` `[N, C]` or `[N, C, parts]`: `[B, H, N, (parts,) D]`."""
        means = []
        for index, share in zip(self.index.split(64), weight.split(64), strict=True):
            tokens = x.index_select(1, index.flatten()).unflatten(1, index.shape).to(weight.dtype)
            means.append(torch.einsum("bnchd,nc...->bhn...d", tokens, share))
        return torch.cat(means, 2)

    def _tiles(self, x: torch.Tensor) -> torch.Tensor:
        batch, _, heads, _ = x.shape
        tiles = x.index_select(1, self.index.flatten()).transpose(1, 2)
        return tiles.reshape(batch * heads * self.problem.grid.num_tiles, -1)


def context_of(x: torch.Tensor, problem: Problem) -> torch.Tensor:
    """The context tokens of `[B, S, ...]`: those before and those after the video tokens."""
    return torch.cat([x[:, : problem.before], x[:, problem.video.stop :]], 1)


def context_key_mask(key: torch.Tensor, context_mask: torch.Tensor | None, problem: Problem) -> torch.Tensor | None:
    """Keys that a context query may see, bool `[B, 1, 1, S]`, or `None` for all."""
    if context_mask is None:
        return None
    mask = torch.ones(key.shape[:2], dtype=torch.bool, device=key.device)
    mask[:, : problem.before] = context_mask[:, : problem.before]
    mask[:, problem.video.stop :] = context_mask[:, problem.before :]
    return mask[:, None, None]


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums are kept."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _add_coarse(output: torch.Tensor, gate: torch.Tensor | None, tiled: Tiled) -> None:
    coarse, video = tiled.coarse(), tiled.problem.video
    for item in range(output.shape[0]):
        spread = tiled.spread(coarse[item : item + 1])
        if gate is not None:
            spread *= gate[item : item + 1, video]
        output[item : item + 1, video] += spread
