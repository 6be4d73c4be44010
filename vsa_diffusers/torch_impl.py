"""Video Sparse Attention in PyTorch: runs anywhere, skips the work of unselected tiles, bounds its memory.

Query tiles are handled a chunk at a time: the tokens of the selected tiles are gathered into one key row per query
tile, and `scaled_dot_product_attention` does the rest, accumulating in fp32. The backward pass recomputes each chunk.

Shapes: B batch, H heads, S tokens, D head_dim, N tiles, C tile capacity, K selected tiles, E extra keys (context
tokens, and in "merge" mode the pooled tiles).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .tiles import TileGrid

MIN_CHUNK_BYTES = 2**22


@dataclass(frozen=True)
class Problem:
    """What one call computes, apart from its tensors. `before` and `after` count the context tokens on either side."""

    grid: TileGrid
    top_k: int
    combine: str
    scale: float
    before: int = 0
    after: int = 0

    @property
    def video(self) -> slice:
        return slice(self.before, self.before + self.grid.num_tokens)


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gate: torch.Tensor | None,
    context_mask: torch.Tensor | None,
    problem: Problem,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output `[B, S, H, D]` and the selected tiles `[B, H, N, K]` (int32, ascending)."""
    tiled = _Tiled(query, key, value, context_mask, problem)
    indices = select_tiles(tiled.mean_query, tiled.mean_key, problem.scale, problem.top_k)
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    for tiles in tiled.chunks():
        tokens, valid = tiled.tokens(tiles)
        rows = tiled.attend(tiles, indices[:, :, tiles], *tiled.gather(tiles, indices[:, :, tiles]))
        output.index_copy_(1, tokens, rows[:, valid].to(output.dtype))
    if problem.combine in ("gate", "sum"):
        _add_coarse(output, tiled.coarse(), gate, tiled)
    if problem.before or problem.after:
        _context_rows(output, query, key, value, context_mask, problem)
    return output, indices


def backward(
    grad_output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gate: torch.Tensor | None,
    context_mask: torch.Tensor | None,
    indices: torch.Tensor,
    problem: Problem,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Gradients of query, key, value and gate. Which tiles are selected is not differentiated, as published."""
    with torch.enable_grad():
        query, key, value = (x.detach().requires_grad_() for x in (query, key, value))
        gate = gate.detach().requires_grad_() if gate is not None else None
        tiled = _Tiled(query, key, value, context_mask, problem)
        leaves = tiled.leaves()
    grads = [torch.zeros_like(leaf, dtype=_accumulator(leaf.dtype)) for leaf in leaves]
    grad_query = torch.zeros_like(query)
    for tiles in tiled.chunks():
        tokens, valid = tiled.tokens(tiles)
        selected = indices[:, :, tiles]
        with torch.enable_grad():
            parts = [x.detach().requires_grad_() for x in tiled.gather(tiles, selected)]
            rows = tiled.attend(tiles, selected, *parts)[:, valid]
            part_grads = torch.autograd.grad(rows, parts, grad_output[:, tokens].to(rows.dtype))
        grad_query[:, tokens] += part_grads[0].movedim(2, 3).flatten(1, 2)[:, valid].to(query.dtype)
        tiled.scatter(grads, selected, *part_grads[1:])
    with torch.enable_grad():
        outputs, output_grads = list(leaves), [g.to(x.dtype) for g, x in zip(grads, leaves, strict=True)]
        if problem.combine in ("gate", "sum"):
            coarse = _spread(tiled.coarse(), tiled)
            outputs.append(coarse if gate is None else coarse * gate[:, problem.video])
            output_grads.append(grad_output[:, problem.video].to(outputs[-1].dtype))
        if problem.before or problem.after:
            context = _context_attention(query, key, value, context_mask, problem)
            outputs.append(context)
            output_grads.append(_context_of(grad_output, problem))
        inputs = [query, key, value] + ([gate] if gate is not None else [])
        input_grads = list(torch.autograd.grad(outputs, inputs, output_grads, allow_unused=True))
    input_grads[0] = grad_query if input_grads[0] is None else input_grads[0] + grad_query
    input_grads = [torch.zeros_like(x) if g is None else g for g, x in zip(input_grads, inputs, strict=True)]
    return input_grads[0], input_grads[1], input_grads[2], input_grads[3] if gate is not None else None


def select_tiles(mean_query: torch.Tensor, mean_key: torch.Tensor, scale: float, top_k: int) -> torch.Tensor:
    """The `top_k` key tiles with the highest coarse score per head and query tile.

    Args:
        mean_query, mean_key: pooled `[B, H, N, D]`.

    Returns:
        int32 `[B, H, N, top_k]`, ascending, so that neighbouring query tiles walk the keys together.
    """
    batch, heads, num_tiles, _ = mean_query.shape
    rows = max(1, MIN_CHUNK_BYTES // (4 * batch * heads * num_tiles))
    keys = mean_key.detach().transpose(-1, -2)
    chunks = []
    for part in mean_query.detach().split(rows, dim=2):
        chosen = (part @ keys * scale).topk(top_k, dim=-1, sorted=False).indices
        chunks.append(chosen.sort(dim=-1).values.to(torch.int32))
    return torch.cat(chunks, dim=2)


class _Tiled:
    """The inputs cut into tiles: key and value copied in tile order, the means, and the extra keys of every row."""

    def __init__(self, query, key, value, context_mask, problem: Problem):
        self.problem, grid = problem, problem.grid
        self.query = query
        index = grid.token_index(query.device)  # [N, C]
        self.valid = index >= 0
        # An empty slot reads its tile's first token: finite, and masked out of every softmax.
        self.index = torch.where(self.valid, index, index[:, :1]) + problem.before
        self.sizes = self.valid.sum(1)
        self.mean_query, self.mean_key, self.mean_value = (self._means(x) for x in (query, key, value))
        self.key_tiles, self.value_tiles = (self._tiles(x) for x in (key, value))  # [B * H * N, C * D]
        self.extra_key, self.extra_value, self.extra_bias = self._extra(key, value, context_mask)
        tile_bytes = key.shape[0] * key.shape[2] * key.shape[3] * key.element_size() * 2
        per_tile = tile_bytes * (problem.top_k * grid.tile_capacity + self.extra_key.shape[2])
        budget = max(MIN_CHUNK_BYTES, tile_bytes * grid.num_tokens // 16)
        self.chunk = max(1, budget // per_tile)

    def leaves(self) -> list[torch.Tensor]:
        return [self.key_tiles, self.value_tiles, self.extra_key, self.extra_value]

    def chunks(self) -> Iterator[slice]:
        for start in range(0, self.problem.grid.num_tiles, self.chunk):
            yield slice(start, min(start + self.chunk, self.problem.grid.num_tiles))

    def tokens(self, tiles: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Sequence positions of the valid tokens of these tiles, and the slots (flattened) that hold them."""
        valid = self.valid[tiles].flatten()
        return self.index[tiles].flatten()[valid], valid

    def gather(self, tiles: slice, selected: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Query `[B, c, H, C, D]`, key and value tiles `[B * H * c * K, C * D]`, extra key and value, of one chunk."""
        rows = self.index[tiles]
        query = self.query.index_select(1, rows.flatten()).unflatten(1, rows.shape).movedim(3, 2)
        flat = self._rows(selected)
        key_tiles, value_tiles = (x.index_select(0, flat) for x in (self.key_tiles, self.value_tiles))
        return query, key_tiles, value_tiles, self.extra_key, self.extra_value

    def scatter(self, grads, selected, grad_key, grad_value, grad_extra_key, grad_extra_value) -> None:
        """Add a chunk's gradients to those of the tiles and extra keys they were gathered from."""
        flat = self._rows(selected)
        grads[0].index_add_(0, flat, grad_key.to(grads[0].dtype))
        grads[1].index_add_(0, flat, grad_value.to(grads[1].dtype))
        grads[2] += grad_extra_key
        grads[3] += grad_extra_value

    def _rows(self, selected: torch.Tensor) -> torch.Tensor:
        """Rows of `key_tiles` that hold the selected tiles `[B, H, c, K]`, flattened."""
        batch, heads = selected.shape[:2]
        offset = torch.arange(batch * heads, device=selected.device).reshape(batch, heads, 1, 1)
        return (selected + offset * self.problem.grid.num_tiles).flatten()

    def attend(self, tiles: slice, selected, query, key_tiles, value_tiles, extra_key, extra_value) -> torch.Tensor:
        """Exact attention of a chunk's query tokens over their rows of keys: `[B, c * C, H, D]`."""
        batch, count, heads, capacity, dim = query.shape
        rows, top_k = batch * heads * count, selected.shape[-1]

        def row_keys(tiles: torch.Tensor, extra: torch.Tensor) -> torch.Tensor:
            tiles = tiles.reshape(rows, 1, top_k * capacity, dim)
            if not extra.shape[2]:
                return tiles
            return torch.cat([tiles, extra[:, :, None].expand(-1, -1, count, -1, -1).reshape(rows, 1, -1, dim)], 2)

        output = F.scaled_dot_product_attention(
            query.transpose(1, 2).reshape(rows, 1, capacity, dim),
            row_keys(key_tiles, extra_key),
            row_keys(value_tiles, extra_value),
            attn_mask=self._bias(selected, query.dtype),
            scale=self.problem.scale,
        )
        return output.reshape(batch, heads, count, capacity, dim).permute(0, 2, 3, 1, 4).flatten(1, 2)

    def coarse(self) -> torch.Tensor:
        """Attention between tiles, `[B, H, N, D]` in fp32 (fp64 for fp64 inputs)."""
        return F.scaled_dot_product_attention(self.mean_query, self.mean_key, self.mean_value, scale=self.problem.scale)

    def _bias(self, selected: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
        """Additive mask `[B * H * c, 1, 1, keys]`: empty slots, padded context, and pooled tiles already selected."""
        batch, heads, count, _ = selected.shape
        partial = self.problem.grid.padding > 0
        if not partial and self.extra_bias is None:
            return None
        slots = torch.zeros(self.valid.shape, device=selected.device, dtype=dtype).masked_fill_(~self.valid, -math.inf)
        bias = [slots[selected.long()].flatten(3)]
        if self.extra_key.shape[2]:
            extra = self.extra_bias.to(dtype)[:, None, None].expand(batch, heads, count, -1).contiguous()
            if self.problem.combine == "merge":
                start = extra.shape[-1] - self.problem.grid.num_tiles
                extra.scatter_(-1, selected.long() + start, -math.inf)
            bias.append(extra)
        return torch.cat(bias, -1).reshape(batch * heads * count, 1, 1, -1)

    def _extra(self, key, value, context_mask):
        """Keys that every query tile sees: context tokens, then (merge) one pooled key per tile of weight its size."""
        problem = self.problem
        keys, values = ([_context_of(x, problem).transpose(1, 2)] for x in (key, value))
        bias = torch.zeros(key.shape[0], problem.before + problem.after, device=key.device, dtype=self.mean_key.dtype)
        if context_mask is not None:
            bias = bias.masked_fill(~context_mask, -math.inf)
        if problem.combine == "merge":
            keys.append(self.mean_key.to(key.dtype))
            values.append(self.mean_value.to(value.dtype))
            bias = torch.cat([bias, self.sizes.to(bias.dtype).log().expand(key.shape[0], -1)], 1)
        needed = context_mask is not None or problem.combine == "merge" or problem.grid.padding > 0
        return torch.cat(keys, 2), torch.cat(values, 2), bias if needed else None

    def _means(self, x: torch.Tensor) -> torch.Tensor:
        """Mean over each tile's valid tokens, `[B, H, N, D]`, accumulated in fp32."""
        weight = (self.valid / self.sizes[:, None]).to(_accumulator(x.dtype))
        means = []
        for index, share in zip(self.index.split(64), weight.split(64), strict=True):
            tokens = x.index_select(1, index.flatten()).unflatten(1, index.shape).to(weight.dtype)
            means.append(torch.einsum("bnchd,nc->bhnd", tokens, share))
        return torch.cat(means, 2)

    def _tiles(self, x: torch.Tensor) -> torch.Tensor:
        batch, _, heads, _ = x.shape
        tiles = x.index_select(1, self.index.flatten()).transpose(1, 2)
        return tiles.reshape(batch * heads * self.problem.grid.num_tiles, -1)


def _spread(coarse: torch.Tensor, tiled: _Tiled) -> torch.Tensor:
    """Give every video token its tile's coarse result: `[B, H, N, D]` to `[B, T*H*W, H, D]`."""
    tile_of_token = torch.empty(tiled.problem.grid.num_tokens, device=coarse.device, dtype=torch.long)
    tile = torch.arange(coarse.shape[2], device=coarse.device)[:, None].expand_as(tiled.index)
    tile_of_token[(tiled.index - tiled.problem.before)[tiled.valid]] = tile[tiled.valid]
    return coarse.transpose(1, 2)[:, tile_of_token]


def _add_coarse(output, coarse, gate, tiled: _Tiled) -> None:
    video = tiled.problem.video
    for batch in range(output.shape[0]):
        spread = _spread(coarse[batch : batch + 1], tiled)
        if gate is not None:
            spread *= gate[batch : batch + 1, video]
        output[batch : batch + 1, video] += spread


def _context_of(x: torch.Tensor, problem: Problem) -> torch.Tensor:
    """The context tokens of `[B, S, ...]`: those before and those after the video tokens."""
    return torch.cat([x[:, : problem.before], x[:, problem.video.stop :]], 1)


def _context_attention(query, key, value, context_mask, problem: Problem) -> torch.Tensor:
    """Dense attention of the context queries over all valid keys, `[B, before + after, H, D]`."""
    mask = None
    if context_mask is not None:
        mask = torch.ones(key.shape[:2], dtype=torch.bool, device=key.device)
        mask[:, : problem.before] = context_mask[:, : problem.before]
        mask[:, problem.video.stop :] = context_mask[:, problem.before :]
        mask = mask[:, None, None]
    rows = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (_context_of(query, problem), key, value)), attn_mask=mask, scale=problem.scale
    )
    return rows.transpose(1, 2)


def _context_rows(output, query, key, value, context_mask, problem: Problem) -> None:
    rows = _context_attention(query, key, value, context_mask, problem)
    output[:, : problem.before] = rows[:, : problem.before]
    output[:, problem.video.stop :] = rows[:, problem.before :]


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
