"""One pass over query, key and value: their means per tile, and key and value copied in tile order where that pays.

Shapes: B batch, S sequence, H heads of this pass, N tiles, V video tokens, D head_dim.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...problem import Problem
from ..arguments import grid_arguments, power_of_two
from ..buffers import PooledTiles
from ..primitives.geometry import SIZES, quotient, slot_offset, tile_box, tile_row
from ..primitives.tile_lists import store_box
from ..recording import Launcher


@triton.jit
def quarter_of(slot, size, extent_h, extent_w, BLOCK: tl.constexpr):
    """The quarter that each slot of a tile lies in, 0 to 3; -1 for slots beyond the last token."""
    row = quotient(slot, extent_w)
    h = row - quotient(slot, extent_w * extent_h) * extent_h
    w = slot - row * extent_w
    quarter = 2 * (h >= (BLOCK[1] + 1) // 2).to(tl.int32) + (w >= (BLOCK[2] + 1) // 2).to(tl.int32)
    return tl.where(slot < size, quarter, -1)


@triton.jit
def _store_whole(x, quarters, log_counts, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Quarters of a full tile, which are where its rows lie: sums that hardly leave their threads."""
    COUNT: tl.constexpr = BLOCK[0] * BLOCK[1] * BLOCK[2] // 4
    part = tl.arange(0, 4)
    dim = tl.arange(0, BLOCK_D)
    rows = tl.reshape(x.to(tl.float32), (BLOCK[0], 2, BLOCK[1] // 2, 2, BLOCK[2] // 2, BLOCK_D))
    sums = tl.reshape(tl.sum(tl.sum(tl.sum(rows, 4), 2), 0), (4, BLOCK_D))
    mean = (sums / COUNT).to(quarters.dtype.element_ty)
    tl.store(quarters + part[:, None] * HEAD_DIM + dim[None, :], mean, dim[None, :] < HEAD_DIM)
    if log_counts is not None:
        tl.store(log_counts + part, tl.log(tl.full((4,), COUNT, tl.float32)))


@triton.jit
def _store_any(x, quarter, quarters, log_counts, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Quarters of any tile, given the one that each row lies in."""
    part = tl.arange(0, 16)  # the least rows of a product, which needs fewer registers than four masked sums
    dim = tl.arange(0, BLOCK_D)
    member = part[:, None] == quarter[None, :]
    count = tl.sum(member.to(tl.int32), 1)
    sums = tl.dot(tl.where(member, 1.0, 0.0).to(x.dtype), x, input_precision="ieee")  # [16, D]
    mean = (sums / tl.maximum(count, 1)[:, None]).to(quarters.dtype.element_ty)
    tl.store(quarters + part[:, None] * HEAD_DIM + dim[None, :], mean, (part[:, None] < 4) & (dim[None, :] < HEAD_DIM))
    if log_counts is not None:
        log_count = tl.where(count > 0, tl.log(tl.maximum(count, 1).to(tl.float32)), float("-inf"))
        tl.store(log_counts + part, log_count, part < 4)


@triton.jit
def store_quarters(
    x,
    slot,
    size,
    extent_h,
    extent_w,
    quarters,
    log_counts,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Means of a tile's quarters, given its tokens `[SLOTS, D]`; and the logarithms of how many there are in each."""
    TILE: tl.constexpr = BLOCK[0] * BLOCK[1] * BLOCK[2]
    EVEN: tl.constexpr = (x.shape[0] == TILE) & (BLOCK_D == HEAD_DIM) & (BLOCK[1] % 2 == 0) & (BLOCK[2] % 2 == 0)
    # At 256 bytes a row, Triton's layout keeps each quarter's rows in one warp: the sums need no shared memory.
    IN_WARP: tl.constexpr = (TILE <= 64) & (BLOCK_D == 128) & (x.dtype.primitive_bitwidth == 16)
    to_do = True
    if EVEN and IN_WARP:  # noqa: SIM102 - known when it is compiled, and the next only when it runs
        if size == TILE:
            _store_whole(x, quarters, log_counts, BLOCK, HEAD_DIM, BLOCK_D)
            to_do = False
    if to_do:
        quarter = quarter_of(slot, size, extent_h, extent_w, BLOCK)
        _store_any(x, quarter, quarters, log_counts, HEAD_DIM, BLOCK_D)


@triton.jit
def _pool_one(
    source,
    mean,
    pooled_kv,
    pooled_offset,
    rows,
    copy,
    max_norm,
    first,
    copy_row,
    size,
    box,
    stride_s,
    SLOTS: tl.constexpr,
    STEP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVICT: tl.constexpr,
):
    """A tile's mean, largest norm and copy, from `STEP` of its rows at a time; returns the last of them `[STEP, D]`."""
    extent_h, extent_w, video_h, video_w = box
    dim = tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_D,), tl.float32)
    square = 0.0
    for start in tl.static_range(0, SLOTS, STEP):
        slot = start + tl.arange(0, STEP)
        tokens = first + slot_offset(slot, extent_h, extent_w, video_h, video_w)
        mask = (slot[:, None] < size) & (dim[None, :] < HEAD_DIM)
        x = tl.load(
            source + tokens.to(tl.int64)[:, None] * stride_s + dim[None, :], mask, other=0.0, eviction_policy=EVICT
        )
        copied = (copy_row + slot[:, None]).to(tl.int64) * HEAD_DIM + dim[None, :]
        if rows is not None and STEP == SLOTS:  # before the sums, for which all rows stay in registers
            tl.store(rows + copy + copied, x, mask)
        wide = x.to(tl.float32)
        total += tl.sum(wide, 0)
        if max_norm is not None:
            square = tl.maximum(square, tl.max(tl.sum(wide * wide, 1), 0))
        if rows is not None and STEP < SLOTS:
            tl.store(rows + copy + copied, x, mask)
    average = total / size
    tl.store(mean + dim, average, dim < HEAD_DIM)
    if pooled_kv is not None:
        tl.store(pooled_kv + pooled_offset + dim, average.to(pooled_kv.dtype.element_ty), dim < HEAD_DIM)
    if max_norm is not None:
        tl.store(max_norm, tl.sqrt(square))
    return x


@triton.jit(do_not_specialize=SIZES)
def pool_kernel(
    query,
    key,
    value,
    means,
    pooled_kv,
    rows,
    log_size,
    max_norm,
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
    batch = tl.program_id(0) // heads // num_tiles
    which = tl.program_id(1)
    t, h, w, extent_t, extent_h, extent_w = tile_box(tile, grid, BLOCK)
    size = extent_t * extent_h * extent_w
    slot = tl.arange(0, SLOTS)
    token = (t * video_h + h) * video_w + w
    first = tokens_before + token
    box = (extent_h, extent_w, video_h, video_w)
    # What is copied passes through few registers, so that many programs have loads under way; quarters need all rows.
    STEP: tl.constexpr = 16 if rows is not None and quarters is None and SLOTS > 16 else SLOTS
    # What is not copied will be read again, from L2 as far as it is there: the last loads must not drive out the first.
    EVICT: tl.constexpr = "evict_first" if rows is None else ""
    copy_row = tile_row(t, h, w, extent_t, extent_h, video_h, video_w)
    batch_head = (batch * heads + head).to(tl.int64)
    row = batch_head * num_tiles + tile
    plane = batch_heads.to(tl.int64) * num_tiles * HEAD_DIM
    copy_plane = (batch_heads.to(tl.int64) * video_t) * video_h * video_w * HEAD_DIM
    copy = batch_head * video_t * video_h * video_w * HEAD_DIM
    mean = means + which * plane + row * HEAD_DIM
    batch = batch.to(tl.int64)
    head = head.to(tl.int64)
    if which == 0:
        source = query + batch * query_b + head * query_h
        max_norm += row
        x = _pool_one(
            source,
            mean,
            None,
            0,
            None,
            0,
            max_norm,
            first,
            copy_row,
            size,
            box,
            query_s,
            SLOTS,
            STEP,
            HEAD_DIM,
            BLOCK_D,
            EVICT,
        )
        if quarters is not None:
            counts_at = log_counts + 4 * tile
            to = quarters + row * (4 * HEAD_DIM)
            store_quarters(x, slot, size, extent_h, extent_w, to, counts_at, BLOCK, HEAD_DIM, BLOCK_D)
        if log_size is not None:
            tl.store(log_size + tile, tl.log2(size.to(tl.float32)))
        store_box(boxes + tile, token if rows is None else copy_row, extent_t, extent_h, extent_w)
    elif which == 1:
        source = key + batch * key_b + head * key_h
        pooled_offset = row * HEAD_DIM
        max_norm += batch_heads * num_tiles + row
        x = _pool_one(
            source,
            mean,
            pooled_kv,
            pooled_offset,
            rows,
            copy,
            max_norm,
            first,
            copy_row,
            size,
            box,
            key_s,
            SLOTS,
            STEP,
            HEAD_DIM,
            BLOCK_D,
            EVICT,
        )
        if quarters is not None:
            to = quarters + 4 * (plane + pooled_offset)
            store_quarters(x, slot, size, extent_h, extent_w, to, None, BLOCK, HEAD_DIM, BLOCK_D)
    else:
        source = value + batch * value_b + head * value_h
        pooled_offset = plane + row * HEAD_DIM
        copy += copy_plane
        _pool_one(
            source,
            mean,
            pooled_kv,
            pooled_offset,
            rows,
            copy,
            None,
            first,
            copy_row,
            size,
            box,
            value_s,
            SLOTS,
            STEP,
            HEAD_DIM,
            BLOCK_D,
            EVICT,
        )


def pool(
    launcher: Launcher,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    problem: Problem,
    *,
    tiled: bool,
    warps: int,
    with_quarters: bool = False,
) -> PooledTiles:
    """Means of `[B, S, H, D]` inputs per tile; with `tiled`, key and value in tile order; quarters if asked for."""
    batch, _, heads, dim = query.shape
    grid, merge = problem.grid, problem.has_pooled_keys
    num_tiles = grid.num_tiles
    means = launcher.empty(query, (3, batch, heads, num_tiles, dim), torch.float32)
    pooled_kv = launcher.empty(query, (2, batch, heads, num_tiles, dim)) if merge else None
    rows = launcher.empty(query, (2, batch * heads, grid.num_tokens, dim)) if tiled else None
    log_size = launcher.empty(means, (-(-num_tiles // 64) * 64,)) if merge else None
    max_norm = launcher.empty(means, (2, batch, heads, num_tiles))
    quarters = launcher.empty(query, (2, batch, heads, num_tiles, 4, dim)) if with_quarters else None
    log_counts = launcher.empty(means, (num_tiles, 4)) if with_quarters else None
    boxes = launcher.empty(query, (num_tiles,), torch.int64)
    needs_value = tiled or problem.has_coarse or problem.has_pooled_keys
    launcher.launch(
        pool_kernel,
        (batch * heads * num_tiles, 3 if needs_value else 2),
        query,
        key,
        value,
        means,
        pooled_kv,
        rows,
        log_size,
        max_norm,
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
        num_warps=warps,
    )
    return PooledTiles(means, pooled_kv, rows, log_size, max_norm, quarters, log_counts, boxes)
