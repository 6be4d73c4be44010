"""Video Sparse Attention in PyTorch: runs anywhere, skips the work of unselected tiles, bounds its memory.

Query tiles are handled a chunk at a time: the tokens of the selected tiles are gathered into one row of keys per query
tile, and `scaled_dot_product_attention` does the rest, accumulating in fp32. Keys that every query tile sees lie behind
the video's tiles, in tiles of their own, so that one gather brings a whole row.

Shapes: b items and h heads of a part, S tokens, D head_dim, N tiles, C tile capacity, K selected tiles, E extra keys
(context tokens, and in "merge" mode the pooled tiles) in X tiles, c tiles of a chunk, R = b * h * c rows,
L = (K + X) * C keys of a row.
"""

from __future__ import annotations

import functools
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
    layout = Layout(problem, query.device, accumulator(query.dtype))
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    shape = (query.shape[0], query.shape[2], problem.grid.num_tiles, problem.top_k)
    indices = torch.empty(shape, dtype=torch.int32, device=query.device)
    for items, heads in parts(query):
        q, k, v = (part_of(x, items, heads) for x in (query, key, value))
        mask = None if context_mask is None else context_mask[items]
        tiled = Tiled(q, k, v, mask, layout)
        selected = select_tiles(tiled.scores(), problem.top_k)
        rows = output if q.shape == output.shape else torch.empty_like(q)
        _sparse(rows, tiled, selected)
        if problem.has_coarse:
            _add_coarse(rows, None if gate is None else gate[items, :, heads], tiled)
        if problem.num_context:
            _context(rows, q, k, v, mask, problem)
        if rows is not output:
            output[items, :, heads] = rows
        indices[items, heads] = selected
    return output, indices


def parts(x: torch.Tensor) -> list[tuple[slice, slice]]:
    """Items and heads of `[B, S, H, D]` that are handled at a time: on a CPU one head, whose keys stay in its cache."""
    if x.device.type != "cpu":
        return [(slice(None), slice(None))]
    items, heads = ([slice(i, i + 1) for i in range(count)] for count in (x.shape[0], x.shape[2]))
    return [(item, head) for item in items for head in heads]


def part_of(x: torch.Tensor, items: slice, heads: slice) -> torch.Tensor:
    """A part of `[B, S, H, D]`; rows of one head are brought together, or every gather would do so first."""
    part = x[items, :, heads]
    return part if part.shape == x.shape else part.contiguous()


class Layout:
    """Where the tokens of every tile are in the sequence, and what they weigh: the same for all items and heads.

    Args:
        problem: what is computed.
        device: of the tensors.
        dtype: in which sums are kept.
    """

    def __init__(self, problem: Problem, device: torch.device, dtype: torch.dtype):
        self.problem, grid = problem, problem.grid
        index = grid.token_index(device)  # [N, C]
        self.valid = index >= 0
        # An empty slot reads its tile's first token: finite, and masked out of every softmax.
        self.index = torch.where(self.valid, index, index[:, :1]) + problem.before
        self.sizes = self.valid.sum(1)
        self.share = self.valid.to(dtype) / self.sizes[:, None]
        self.slot_bias = self.share.new_zeros(self.valid.shape).masked_fill_(~self.valid, -math.inf)

    @functools.cached_property
    def quarters(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What each token weighs in the mean of its quarter of the tile `[N, 4, C]`, and the quarters' tokens."""
        members = quarters(self.valid, self.problem.grid)
        counts = members.sum(1)
        share = members.to(self.share.dtype) / counts[:, None].clamp_min(1)
        return share.transpose(1, 2).contiguous(), counts

    @functools.cached_property
    def tile_of_token(self) -> torch.Tensor:
        """The tile of every video token."""
        tile = torch.arange(len(self.index), device=self.index.device)[:, None].expand_as(self.index)
        tiles = torch.empty(self.problem.grid.num_tokens, device=tile.device, dtype=torch.long)
        tiles[(self.index - self.problem.before)[self.valid]] = tile[self.valid]
        return tiles


class Tiled:
    """The inputs `[b, S, h, D]` cut into tiles: means, and key and value copied in tile order, extra keys behind."""

    def __init__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        context_mask: torch.Tensor | None,
        layout: Layout,
    ):
        self.query, self.key, self.layout, self.problem = query, key, layout, layout.problem
        grid, share = self.problem.grid, layout.share[:, None]
        self.mean_query, self.mean_key, self.mean_value = (
            self._means(x, share)[:, :, :, 0] for x in (query, key, value)
        )
        extra_key, extra_value, self.extra_bias = self._extra(key, value, context_mask)
        self.num_extra = extra_key.shape[2]
        self.key_tiles, self.value_tiles = self._tiles(key, extra_key), self._tiles(value, extra_value)
        items, heads, tiles, width = self.key_tiles.shape
        self.tiles_per_row = self.problem.top_k + tiles - grid.num_tiles
        tile_bytes = 2 * items * heads * width * key.element_size()
        budget = max(MIN_CHUNK_BYTES, tile_bytes * grid.num_tiles // 16)
        self._chunk = min(grid.num_tiles, max(1, budget // (tile_bytes * self.tiles_per_row)))

    def scores(self) -> Iterator[torch.Tensor]:
        """What the key tiles are selected by, `[b, h, c, N]` for one chunk of query tiles after another."""
        scale = self.problem.scale
        if self.problem.selection == "mean":
            return mean_scores(self.mean_query, self.mean_key, scale)
        share, counts = self.layout.quarters
        return quarter_scores(self._means(self.query, share), self._means(self.key, share), counts, scale)

    def chunks(self) -> Iterator[slice]:
        """Ranges of query tiles whose gathered keys are about a sixteenth of key and value, or one tile."""
        for start in range(0, self.problem.grid.num_tiles, self._chunk):
            yield slice(start, min(start + self._chunk, self.problem.grid.num_tiles))

    def tokens(self, x: torch.Tensor, tiles: slice) -> torch.Tensor:
        """The tokens of a chunk's tiles: `[b, S, h, D]` to `[R, C, D]`; empty slots repeat a valid token."""
        rows = self.layout.index[tiles]
        return x.index_select(1, rows.flatten()).unflatten(1, rows.shape).movedim(3, 1).flatten(0, 2)

    def put_tokens(self, x: torch.Tensor, rows: torch.Tensor, tiles: slice) -> None:
        """The inverse of `tokens`: write the valid slots of `rows` into `x` `[b, S, h, D]`."""
        items, _, heads, dim = x.shape
        rows, index = rows.reshape(items, heads, -1, dim), self.layout.index[tiles].flatten()
        if self.problem.grid.padding > 0:
            valid = self.layout.valid[tiles].flatten()
            rows, index = rows[:, :, valid], index[valid]
        x.index_copy_(1, index, rows.transpose(1, 2).to(x.dtype))

    def selected_rows(self, selected: torch.Tensor) -> torch.Tensor:
        """Rows of the flattened tiles that hold a chunk's keys: the selected `[b, h, c, K]`, then the extra ones."""
        items, heads, count, _ = selected.shape
        tiles = self.key_tiles.shape[2]
        extra = torch.arange(self.problem.grid.num_tiles, tiles, device=selected.device)
        offset = torch.arange(items * heads, device=selected.device).reshape(items, heads, 1, 1) * tiles
        return (torch.cat([selected, extra.expand(items, heads, count, -1)], -1) + offset).flatten()

    def new_rows(self) -> torch.Tensor:
        """Room for the rows of one chunk: new memory for every chunk would cost a CPU as much as filling it."""
        items, heads, _, width = self.key_tiles.shape
        return self.key_tiles.new_empty(items * heads * self._chunk * self.tiles_per_row, width)

    def row_keys(self, tiles: torch.Tensor, rows: torch.Tensor, room: torch.Tensor) -> torch.Tensor:
        """Keys or values that each query tile of a chunk sees, `[R, L, D]`, in `room`."""
        room = room[: len(rows)]
        torch.index_select(tiles.flatten(0, 2), 0, rows, out=room)
        return room.view(-1, self.tiles_per_row * self.problem.grid.tile_capacity, self.key.shape[-1])

    def bias(self, selected: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
        """Additive mask `[R, 1, 1, L]`: empty slots, padded context, and pooled tiles already selected."""
        grid = self.problem.grid
        if grid.padding == 0 and self.extra_bias is None:
            return None
        slots = self.problem.top_k * grid.tile_capacity
        bias = torch.zeros(
            (*selected.shape[:3], self.tiles_per_row * grid.tile_capacity), device=selected.device, dtype=dtype
        )
        if grid.padding > 0:
            by_tile = self.layout.slot_bias.index_select(0, selected.flatten())
            bias[..., :slots] = by_tile.reshape(*selected.shape[:3], slots)
        if self.extra_bias is not None:
            bias[..., slots:] = self.extra_bias[:, None, None]
            if self.problem.combine == "merge":
                bias[..., slots + self.problem.num_context :].scatter_(-1, selected.long(), -math.inf)
        return bias.reshape(-1, 1, 1, bias.shape[-1])

    def coarse(self) -> torch.Tensor:
        """Attention between tiles, `[b, h, N, D]` in fp32 (fp64 for fp64 inputs)."""
        return F.scaled_dot_product_attention(self.mean_query, self.mean_key, self.mean_value, scale=self.problem.scale)

    def spread(self, per_tile: torch.Tensor) -> torch.Tensor:
        """Give every video token its tile's value: `[b, h, N, D]` to `[b, T*H*W, h, D]`."""
        return per_tile.transpose(1, 2).index_select(1, self.layout.tile_of_token)

    def _extra(self, key, value, context_mask):
        """Keys that every query tile sees: context tokens, then (merge) one pooled key per tile of weight its size.

        Their additive mask `[b, X * C]` shuts what fills their last tile; `None` where there is nothing to shut.
        """
        problem = self.problem
        keys, values = ([context_of(x, problem).transpose(1, 2)] for x in (key, value))
        bias = torch.zeros(key.shape[0], problem.num_context, device=key.device, dtype=self.mean_key.dtype)
        if context_mask is not None:
            bias = bias.masked_fill(~context_mask, -math.inf)
        if problem.combine == "merge":
            keys.append(self.mean_key.to(key.dtype))
            values.append(self.mean_value.to(value.dtype))
            bias = torch.cat([bias, self.layout.sizes.to(bias.dtype).log().expand(key.shape[0], -1)], 1)
        empty = -bias.shape[1] % problem.grid.tile_capacity
        needed = context_mask is not None or problem.combine == "merge" or empty > 0
        return torch.cat(keys, 2), torch.cat(values, 2), F.pad(bias, (0, empty), value=-math.inf) if needed else None

    def _means(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Sums over each tile's slots by their `weight` `[N, parts, C]`: `[b, h, N, parts, D]`."""
        means = []
        for index, share in zip(self.layout.index.split(64), weight.split(64), strict=True):
            tokens = x.index_select(1, index.flatten()).unflatten(1, index.shape).to(weight.dtype)
            means.append(share @ tokens.movedim(3, 1))
        return torch.cat(means, 2)

    def _tiles(self, x: torch.Tensor, extra: torch.Tensor) -> torch.Tensor:
        """Tokens in tile order, then the extra ones `[b, h, E, D]` in tiles of their own: `[b, h, N + X, C * D]`."""
        items, _, heads, dim = x.shape
        slots, capacity, count = self.layout.index.numel(), self.problem.grid.tile_capacity, extra.shape[2]
        tiles = x.new_empty(items, heads, slots + -(-count // capacity) * capacity, dim)
        tiles[:, :, :slots] = x.index_select(1, self.layout.index.flatten()).transpose(1, 2)
        tiles[:, :, slots : slots + count] = extra
        tiles[:, :, slots + count :] = 0
        return tiles.view(items, heads, -1, capacity * dim)


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


def _sparse(output: torch.Tensor, tiled: Tiled, indices: torch.Tensor) -> None:
    key_room, value_room = tiled.new_rows(), tiled.new_rows()
    for tiles in tiled.chunks():
        selected = indices[:, :, tiles]
        rows = tiled.selected_rows(selected)
        attended = F.scaled_dot_product_attention(
            tiled.tokens(tiled.query, tiles)[:, None],
            tiled.row_keys(tiled.key_tiles, rows, key_room)[:, None],
            tiled.row_keys(tiled.value_tiles, rows, value_room)[:, None],
            attn_mask=tiled.bias(selected, output.dtype),
            scale=tiled.problem.scale,
        )
        tiled.put_tokens(output, attended, tiles)


def _add_coarse(output: torch.Tensor, gate: torch.Tensor | None, tiled: Tiled) -> None:
    coarse, video = tiled.coarse(), tiled.problem.video
    for item in range(output.shape[0]):
        spread = tiled.spread(coarse[item : item + 1])
        if gate is not None:
            spread *= gate[item : item + 1, video]
        output[item : item + 1, video] += spread


def _context(output, query, key, value, context_mask, problem: Problem) -> None:
    """The context tokens' own attention, dense."""
    rows = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (context_of(query, problem), key, value)),
        attn_mask=context_key_mask(key, context_mask, problem),
        scale=problem.scale,
    ).transpose(1, 2)
    output[:, : problem.before] = rows[:, : problem.before]
    output[:, problem.video.stop :] = rows[:, problem.before :]
