"""One pass over query, key and value: their means per tile, and key and value copied in tile order where that pays.

Shapes: B batch, S sequence, H heads of this pass, N tiles, V video tokens, D head_dim.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..problem import Problem
from .geometry import SIZES, grid_arguments, slot_offset, tile_box, tile_row
from .lists import store_box
from .quarters import store_quarters
from .replay import Work
from .tuning import power_of_two


class Pooled(NamedTuple):
    """What the pass leaves behind; `None` where nobody asked for it."""

    means: torch.Tensor  # fp32 [query and key (and value), B, H, N, D]
    proxies: torch.Tensor | None  # key and value means in the dtype of the inputs, [2, B, H, N, D]
    rows: torch.Tensor | None  # key and value in tile order, [2, B * H, V, D]
    log_size: torch.Tensor | None  # log2 of the tile sizes, fp32 [N rounded up to 64], undefined beyond the last tile
    longest: torch.Tensor  # norm of the longest row of each tile, fp32 [query and key, B, H, N]
    quarters: torch.Tensor | None  # means of their quarters in the dtype of the inputs, [query and key, B, H, N, 4, D]
    log_counts: torch.Tensor | None  # logarithm of the tokens in each quarter, fp32 [N, 4]
    boxes: torch.Tensor  # first row (or token) of every tile, and its extents, as in `store_box`, int64 [N]


@triton.jit
def _pool_one(
    source,
    mean,
    proxies,
    proxy,
    rows,
    copy,
    longest,
    tokens,
    row,
    size,
    stride_s,
    SLOTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    slot = tl.arange(0, SLOTS)
    dim = tl.arange(0, BLOCK_D)
    mask = (slot[:, None] < size) & (dim[None, :] < HEAD_DIM)
    x = tl.load(source + tokens.to(tl.int64)[:, None] * stride_s + dim[None, :], mask, other=0.0)  # [SLOTS, BLOCK_D]
    wide = x.to(tl.float32)
    average = tl.sum(wide, 0) / size
    tl.store(mean + dim, average, dim < HEAD_DIM)
    if proxies is not None:
        tl.store(proxies + proxy + dim, average.to(proxies.dtype.element_ty), dim < HEAD_DIM)
    if longest is not None:
        tl.store(longest, tl.sqrt(tl.max(tl.sum(wide * wide, 1), 0)))
    if rows is not None:
        tl.store(rows + copy + (row + slot[:, None]).to(tl.int64) * HEAD_DIM + dim[None, :], x, mask)
    return x


@triton.jit(do_not_specialize=SIZES)
def pool_kernel(
    query,
    key,
    value,
    means,
    proxies,
    rows,
    log_size,
    longest,
    quarters,
    log_counts,
    boxes,
    query_b,
    query_s,
    query_h,
    key_b,
    key_s,
    key_h,
    value_b,
    value_s,
    value_h,
    heads,
    batch_heads,
    num_tiles,
    tokens_before,
    video_t,
    video_h,
    video_w,
    tiles_h,
    tiles_w,
    BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Program (tile and head, head fastest; which of query, key and value)."""
    grid = (video_t, video_h, video_w, tiles_h, tiles_w)
    head = tl.program_id(0) % heads
    tile = tl.program_id(0) // heads % num_tiles
    item = tl.program_id(0) // heads // num_tiles
    which = tl.program_id(1)
    t, h, w, extent_t, extent_h, extent_w = tile_box(tile, grid, BLOCK)
    size = extent_t * extent_h * extent_w
    slot = tl.arange(0, SLOTS)
    token = (t * video_h + h) * video_w + w
    tokens = tokens_before + token + slot_offset(slot, extent_h, extent_w, video_h, video_w)
    row = tile_row(t, h, w, extent_t, extent_h, video_h, video_w)
    place = (item * heads + head).to(tl.int64)
    summary = place * num_tiles + tile
    copies = batch_heads.to(tl.int64) * num_tiles * HEAD_DIM
    lines = (batch_heads.to(tl.int64) * video_t) * video_h * video_w * HEAD_DIM
    copy = place * video_t * video_h * video_w * HEAD_DIM
    mean = means + which * copies + summary * HEAD_DIM
    item = item.to(tl.int64)
    head = head.to(tl.int64)
    if which == 0:
        source = query + item * query_b + head * query_h
        longest += summary
        x = _pool_one(source, mean, None, 0, None, 0, longest, tokens, row, size, query_s, SLOTS, HEAD_DIM, BLOCK_D)
        if quarters is not None:
            counts_at = log_counts + 4 * tile
            to = quarters + summary * (4 * HEAD_DIM)
            store_quarters(x, slot, size, extent_h, extent_w, to, counts_at, BLOCK, HEAD_DIM, BLOCK_D)
        if log_size is not None:
            tl.store(log_size + tile, tl.log2(size.to(tl.float32)))
        store_box(boxes + tile, token if rows is None else row, extent_t, extent_h, extent_w)
    elif which == 1:
        source = key + item * key_b + head * key_h
        at = summary * HEAD_DIM
        longest += batch_heads * num_tiles + summary
        x = _pool_one(
            source, mean, proxies, at, rows, copy, longest, tokens, row, size, key_s, SLOTS, HEAD_DIM, BLOCK_D
        )
        if quarters is not None:
            to = quarters + 4 * (copies + at)
            store_quarters(x, slot, size, extent_h, extent_w, to, None, BLOCK, HEAD_DIM, BLOCK_D)
    else:
        source = value + item * value_b + head * value_h
        at = copies + summary * HEAD_DIM
        copy += lines
        _pool_one(source, mean, proxies, at, rows, copy, None, tokens, row, size, value_s, SLOTS, HEAD_DIM, BLOCK_D)


def pool(
    work: Work,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    problem: Problem,
    *,
    tiled: bool,
    parts: bool = False,
) -> Pooled:
    """Means of `[B, S, H, D]` inputs per tile; with `tiled`, key and value in tile order; with `parts`, quarters."""
    batch, _, heads, dim = query.shape
    grid, merge = problem.grid, problem.combine == "merge"
    num_tiles = grid.num_tiles
    means = work.empty(query, (3, batch, heads, num_tiles, dim), torch.float32)
    proxies = work.empty(query, (2, batch, heads, num_tiles, dim)) if merge else None
    rows = work.empty(query, (2, batch * heads, grid.num_tokens, dim)) if tiled else None
    log_size = work.empty(means, (-(-num_tiles // 64) * 64,)) if merge else None
    longest = work.empty(means, (2, batch, heads, num_tiles))
    quarters = work.empty(query, (2, batch, heads, num_tiles, 4, dim)) if parts else None
    log_counts = work.empty(means, (num_tiles, 4)) if parts else None
    boxes = work.empty(query, (num_tiles,), torch.int64)
    needs_value = tiled or problem.combine != "sparse"
    work.launch(
        pool_kernel,
        (batch * heads * num_tiles, 3 if needs_value else 2),
        query,
        key,
        value,
        means,
        proxies,
        rows,
        log_size,
        longest,
        quarters,
        log_counts,
        boxes,
        *query.stride()[:3],
        *key.stride()[:3],
        *value.stride()[:3],
        heads,
        batch * heads,
        num_tiles,
        problem.before,
        *grid_arguments(grid),
        SLOTS=power_of_two(grid.tile_capacity),
        HEAD_DIM=dim,
        BLOCK_D=power_of_two(dim),
        num_warps=4 if parts and dim > 128 else 1 if tiled and not parts else 2,
    )
    return Pooled(means, proxies, rows, log_size, longest, quarters, log_counts, boxes)
