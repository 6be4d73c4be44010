"""The sparse kernel for Hopper, in Gluon: half of its warps fetch keys and values, the other half multiply.

What it computes is what `attend.py` does, in the same order. What differs is who waits for whom: the fetching warps run
ahead of the multiplying ones, across the ends of query tiles, as far as the buffers reach. A program takes query tile
after query tile, so that the last steps of one hide the first loads of the next.

Tiles whose logits might not fit the bounded softmax, or turn out not to have, are done again at the end, online.

M = 64 query rows, K_N = 64 keys of one step, D = 128.
"""
# Tuples are taken apart whole, so that one sees what is in them.
# ruff: noqa: RUF059

from __future__ import annotations

import math

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..tiles import TileGrid
from ..torch_impl import Problem
from .attend import FARTHEST, HEADROOM, LEAST_TOTAL, LN2
from .geometry import SIZES, grid_arguments, slot_offset, tile_box
from .pool import Pooled
from .replay import Work
from .rows import block_offset, tail_rows
from .select import GROUP, Lists
from .tuning import may_specialise

ROWS = gl.constexpr(64)
DIM = gl.constexpr(128)
STAGES = gl.constexpr(3)
# How rows lie in registers when they are loaded and stored, and how the products lay out logits and outputs.
LINES = gl.constexpr(gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0]))
LOGITS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
OUTPUT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16]))
WEIGHTS = gl.constexpr(gl.DotOperandLayout(0, OUTPUT, 2))
SHARED = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))
BOX = gl.constexpr(gl.NVMMASharedLayout(128, 16, 5))
_synchronise = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # renamed in Triton 3.7


@gluon.jit
def _query_tile(task, heads, num_tiles, grid, BLOCK: gl.constexpr):
    """Batch item and head of a task, and its tile: first token, how many there are, and the extents of its plane."""
    video_t, video_h, video_w, tiles_h, tiles_w = grid
    place = task // num_tiles
    t, h, w, extent_t, extent_h, extent_w = tile_box(task % num_tiles, grid, BLOCK)
    first = (t * video_h + h) * video_w + w
    return place // heads, place % heads, first, extent_t * extent_h * extent_w, extent_h, extent_w


@gluon.jit
def _rows_of(tile, in_full, grid, BLOCK: gl.constexpr, LAYOUT: gl.constexpr):
    """Tokens of a query tile's rows, counted from its first one, and which of them exist.

    `in_full` are those of a full tile, so that only partial ones need be worked out.
    """
    video_t, video_h, video_w, tiles_h, tiles_w = grid
    item, head, first, size, extent_h, extent_w = tile
    slot = gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    offset = in_full
    if size < BLOCK[0] * BLOCK[1] * BLOCK[2]:
        offset = slot_offset(slot, extent_h, extent_w, video_h, video_w)
    return offset.to(gl.int64), slot < size


@gluon.jit
def _lines_at(base, tile, strides, offset):
    """Where the rows `[64, 128]` of a query tile begin in a tensor `[B, S, H, D]` with these strides."""
    item, head, first, size, extent_h, extent_w = tile
    stride_b, stride_s, stride_h = strides
    base += item.to(gl.int64) * stride_b + head.to(gl.int64) * stride_h + first.to(gl.int64) * stride_s
    dim = gl.arange(0, DIM, gl.SliceLayout(0, LINES))
    return base + (offset * stride_s)[:, None] + dim[None, :]


@gluon.jit
def _ahead(task, lists, numbers, GROUP: gl.constexpr):
    """What a task begins with, asked for while another one runs: the bound of its logits, full tiles in its list, keys
    of partial ones, and where the first tile begins."""
    starts, tail, counts, longest, reach, redo = lists
    tasks, heads, batch_heads, num_tiles, top_k, tail_width, kept_width, scale = numbers
    exists = task < tasks
    line = gl.cast(task, gl.int64)
    bound = gl.load(longest + line, exists, other=0.0) * gl.load(reach + task // num_tiles, exists, other=0.0)
    full_tiles = top_k
    listed_keys = 0
    if counts is not None:
        full_tiles = gl.load(counts + line * 2, exists, other=0)
        listed_keys = gl.load(counts + line * 2 + 1, exists, other=0) * GROUP
    first_start = gl.load(starts + line * top_k, exists, other=0)
    return bound * gl.abs(scale), full_tiles, listed_keys, first_start


@gluon.jit
def _await_key_room(bars, at):
    """Wait until step `at - STAGES` has used its keys."""
    mbarrier.wait(bars[2].index(at % STAGES), (at // STAGES & 1) ^ 1)


@gluon.jit
def _await_value_room(bars, at):
    """Wait until step `at - STAGES` has used its values: the one after it says so, together with its own keys."""
    if at >= STAGES:
        after = at + 1
        mbarrier.wait(bars[2].index(after % STAGES), (after // STAGES & 1) ^ 1)


@gluon.jit
def _fetch_rows(key, value, key_offset, value_offset, exists, buffers, bars, at):
    """Copy 64 rows of key and value, wherever they lie, into the buffers of step `at`, once those are free."""
    keys, values = buffers
    key_ready, value_ready, _ = bars
    dim = gl.arange(0, DIM, gl.SliceLayout(0, LINES))
    slot = at % STAGES
    mask = exists[:, None]
    _await_key_room(bars, at)
    async_copy.async_copy_global_to_shared(keys.index(slot), key + key_offset[:, None] + dim[None, :], mask=mask)
    async_copy.mbarrier_arrive(key_ready.index(slot))
    _await_value_room(bars, at)
    async_copy.async_copy_global_to_shared(values.index(slot), value + value_offset[:, None] + dim[None, :], mask=mask)
    async_copy.mbarrier_arrive(value_ready.index(slot))
    _synchronise()  # every thread's copies are counted before the phase may end
    mbarrier.arrive(key_ready.index(slot))
    mbarrier.arrive(value_ready.index(slot))


@gluon.jit
def _fetch_lines(wanted, in_full, grid, buffers, bars, at, BLOCK: gl.constexpr):
    """What lies between two query tiles: the query of the next one, where key goes, and this one's gate, where value
    goes."""
    query, query_strides, next_tile, exists, gate, gate_strides, tile = wanted
    keys, values = buffers
    key_ready, value_ready, _ = bars
    slot = at % STAGES
    _await_key_room(bars, at)
    offset, inside = _rows_of(next_tile, in_full, grid, BLOCK, LINES)
    lines = _lines_at(query, next_tile, query_strides, offset)
    async_copy.async_copy_global_to_shared(keys.index(slot), lines, mask=(inside & exists)[:, None])
    async_copy.mbarrier_arrive(key_ready.index(slot))
    _await_value_room(bars, at)
    if gate is not None:
        offset, inside = _rows_of(tile, in_full, grid, BLOCK, LINES)
        lines = _lines_at(gate, tile, gate_strides, offset)
        async_copy.async_copy_global_to_shared(values.index(slot), lines, mask=inside[:, None])
        async_copy.mbarrier_arrive(value_ready.index(slot))
    _synchronise()
    mbarrier.arrive(key_ready.index(slot))
    mbarrier.arrive(value_ready.index(slot))


@gluon.jit
def _fetch_tile(key_descriptor, value_descriptor, corner, buffers, bars, at, BLOCK: gl.constexpr):
    """The same for a full tile that begins at `corner`, in the coordinates of the descriptors."""
    keys, values = buffers
    key_ready, value_ready, _ = bars
    slot = at % STAGES
    to_key, to_value = keys.index(slot), values.index(slot)
    if BLOCK is not None:  # a box of the video, not rows that lie side by side
        to_key = to_key._reinterpret(keys.dtype, [1, BLOCK[0], BLOCK[1], BLOCK[2], DIM], BOX)
        to_value = to_value._reinterpret(keys.dtype, [1, BLOCK[0], BLOCK[1], BLOCK[2], DIM], BOX)
    _await_key_room(bars, at)
    mbarrier.expect(key_ready.index(slot), ROWS * DIM * 2)
    tma.async_copy_global_to_shared(key_descriptor, corner, key_ready.index(slot), to_key)
    _await_value_room(bars, at)
    mbarrier.expect(value_ready.index(slot), ROWS * DIM * 2)
    tma.async_copy_global_to_shared(value_descriptor, corner, value_ready.index(slot), to_value)


@gluon.jit
def _producer(
    sources,
    lists,
    strides,
    line_sources,
    line_strides,
    numbers,
    grid,
    buffers,
    bars,
    finished,
    BLOCK: gl.constexpr,
    GROUP: gl.constexpr,
    TILED: gl.constexpr,
):
    key, value, key_descriptor, value_descriptor, proxies = sources
    starts, tail, counts, longest, reach, redo = lists
    key_b, key_s, key_h, value_b, value_s, value_h = strides
    query, gate = line_sources
    query_strides, gate_strides = line_strides
    tasks, heads, batch_heads, num_tiles, top_k, tail_width, kept_width, scale = numbers
    video_t, video_h, video_w, tiles_h, tiles_w = grid
    video_tokens = video_t * video_h * video_w
    slot = gl.arange(0, ROWS, gl.SliceLayout(1, LINES))
    inside = block_offset(slot, video_h, video_w, BLOCK)
    at = 0
    repeat = True
    for attempt in gl.static_range(2):
        if attempt == 1:
            mbarrier.wait(finished, 0)
            repeat = gl.load(redo + tasks + gl.program_id(0)) > 0
        if repeat:
            following = _ahead(gl.program_id(0), lists, numbers, GROUP)
            tile = _query_tile(gl.program_id(0), heads, num_tiles, grid, BLOCK)
            _fetch_lines((query, query_strides, tile, True, None, None, tile), inside, grid, buffers, bars, at, BLOCK)
            at += 1
            for task in range(gl.program_id(0), tasks, gl.num_programs(0)):
                bound, full_tiles, listed_keys, next_start = following
                following = _ahead(task + gl.num_programs(0), lists, numbers, GROUP)
                if attempt == 0:
                    mine = bound < FARTHEST
                else:
                    mine = gl.load(redo + task) > 0
                if mine:
                    place = gl.cast(task // num_tiles, gl.int64)
                    line = gl.cast(task, gl.int64)
                    list_at = starts + line * top_k
                    key_base, value_base = key, value
                    item, head = task // num_tiles // heads, task // num_tiles % heads
                    if TILED:
                        first_row = (place * video_tokens).to(gl.int32)
                        key_base += place * video_tokens * DIM
                        value_base += place * video_tokens * DIM
                        key_step, value_step = DIM, DIM
                    else:
                        key_base += item.to(gl.int64) * key_b + head.to(gl.int64) * key_h
                        value_base += item.to(gl.int64) * value_b + head.to(gl.int64) * value_h
                        key_step, value_step = key_s, value_s
                    for step in range(full_tiles):
                        start = next_start
                        next_start = gl.load(list_at + step + 1, mask=step + 1 < full_tiles, other=0)
                        if TILED:
                            corner = [first_row + start, 0]
                            _fetch_tile(key_descriptor, value_descriptor, corner, buffers, bars, at, None)
                        else:
                            corner = [
                                item,
                                start // (video_h * video_w),
                                start // video_w % video_h,
                                start % video_w,
                                head * DIM,
                            ]
                            _fetch_tile(key_descriptor, value_descriptor, corner, buffers, bars, at, BLOCK)
                        at += 1
                    if tail is not None:
                        for first in range(0, listed_keys, ROWS):
                            listed = first + slot
                            rows, exists = tail_rows(
                                tail + line * tail_width * 2,
                                listed,
                                listed < listed_keys,
                                video_h,
                                video_w,
                                TILED,
                                GROUP,
                            )
                            rows = rows.to(gl.int64)
                            _fetch_rows(
                                key_base,
                                value_base,
                                rows * key_step,
                                rows * value_step,
                                exists,
                                buffers,
                                bars,
                                at,
                            )
                            at += 1
                    if proxies is not None:
                        mean_key = proxies + place * num_tiles * DIM
                        mean_value = mean_key + batch_heads.to(gl.int64) * num_tiles * DIM
                        for first in range(0, num_tiles, ROWS):
                            offset = (first + slot) * DIM
                            _fetch_rows(
                                mean_key, mean_value, offset, offset, first + slot < num_tiles, buffers, bars, at
                            )
                            at += 1
                next_task = task + gl.num_programs(0)
                next_tile = _query_tile(next_task, heads, num_tiles, grid, BLOCK)
                exists = next_task < tasks
                _fetch_lines(
                    (query, query_strides, next_tile, exists, gate, gate_strides, tile),
                    inside,
                    grid,
                    buffers,
                    bars,
                    at,
                    BLOCK,
                )
                at += 1
                tile = next_tile


@gluon.jit
def _step(q, buffers, bars, at, state, scale, bias, FENCE: gl.constexpr, BOUNDED: gl.constexpr):
    """One step of the softmax in base 2. The product with the values is left running; the next step waits for it.

    Args:
        state: highest logit (or the fixed offset), sums and outputs so far, and the weights that may still be read.
        FENCE: the buffers were filled by threads, not by the copy engine.
    """
    keys, values = buffers
    key_ready, value_ready, used = bars
    highest, total, acc, p = state
    slot = at % STAGES
    phase = at // STAGES & 1
    mbarrier.wait(key_ready.index(slot), phase)
    if FENCE:
        fence_async_shared()
    s = warpgroup_mma(
        q, keys.index(slot).permute((1, 0)), gl.zeros((ROWS, ROWS), gl.float32, LOGITS), use_acc=False, is_async=True
    )
    s, acc, p = warpgroup_mma_wait(0, deps=(s, acc, p))
    mbarrier.arrive(used.index(slot))
    if BOUNDED:
        shift = -highest[:, None]
        if bias is not None:
            shift = bias[None, :] - highest[:, None]
        weights = gl.exp2(gl.fma(s, gl.to_tensor(scale), shift))
        total += gl.sum(weights, 1)
    else:
        s = s * scale
        if bias is not None:
            s += bias[None, :]
        new_highest = gl.maximum(highest, gl.max(s, 1))
        weights = gl.exp2(s - new_highest[:, None])
        shrink = gl.exp2(highest - new_highest)
        total = total * shrink + gl.sum(weights, 1)
        acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, OUTPUT))[:, None]
        highest = new_highest
    p = gl.convert_layout(weights.to(values.dtype), WEIGHTS)
    mbarrier.wait(value_ready.index(slot), phase)
    if FENCE:
        fence_async_shared()
    acc = warpgroup_mma(p, values.index(slot), acc, is_async=True)
    return highest, total, acc, p


@gluon.jit
def _take_query(q, buffers, bars, at):
    """Move the next tile's query from where keys arrive to where it stays."""
    keys, values = buffers
    key_ready, value_ready, used = bars
    slot = at % STAGES
    mbarrier.wait(key_ready.index(slot), at // STAGES & 1)
    q.store(keys.index(slot).load(LINES))
    fence_async_shared()
    mbarrier.arrive(used.index(slot))


@gluon.jit
def _consumer(
    sources,
    targets,
    lists,
    strides,
    numbers,
    grid,
    q_buffer,
    buffers,
    bars,
    finished,
    BLOCK: gl.constexpr,
    GROUP: gl.constexpr,
    TILED: gl.constexpr,
):
    gate, proxies, coarse, kept, log_size = sources
    output, lse = targets
    starts, tail, counts, longest, reach, redo = lists
    output_strides, lse_b = strides
    tasks, heads, batch_heads, num_tiles, top_k, tail_width, kept_width, scale = numbers
    video_t, video_h, video_w, tiles_h, tiles_w = grid
    TILE: gl.constexpr = BLOCK[0] * BLOCK[1] * BLOCK[2]
    column = gl.arange(0, ROWS, gl.SliceLayout(0, LOGITS))
    whole = gl.where(column < TILE, 0.0, float("-inf")) if TILE != ROWS else None
    lines_in_full = block_offset(gl.arange(0, ROWS, gl.SliceLayout(1, LINES)), video_h, video_w, BLOCK)
    rows_in_full = block_offset(gl.arange(0, ROWS, gl.SliceLayout(1, OUTPUT)), video_h, video_w, BLOCK)
    vanished = gl.zeros((ROWS,), gl.int32, gl.SliceLayout(1, OUTPUT))
    at = 0
    again = 0
    repeat = True
    for attempt in gl.static_range(2):
        if attempt == 1:
            again += gl.max(vanished, 0)
            gl.store(redo + tasks + gl.program_id(0), again)
            mbarrier.arrive(finished)
            repeat = again > 0
        if repeat:
            next_bound, next_full, next_keys, _ = _ahead(gl.program_id(0), lists, numbers, GROUP)
            _take_query(q_buffer, buffers, bars, at)
            at += 1
            for task in range(gl.program_id(0), tasks, gl.num_programs(0)):
                bound, full_tiles, listed_keys = next_bound, next_full, next_keys
                next_bound, next_full, next_keys, _ = _ahead(task + gl.num_programs(0), lists, numbers, GROUP)
                if attempt == 0:
                    mine = bound < FARTHEST
                    again += gl.where(mine, 0, 1)
                    gl.store(redo + task, gl.where(mine, 0, 1))
                else:
                    mine = gl.load(redo + task) > 0
                if mine:
                    line = gl.cast(task, gl.int64)
                    if attempt == 0:
                        highest = gl.full((ROWS,), 0.0, gl.float32, gl.SliceLayout(1, LOGITS)) + gl.maximum(
                            bound - HEADROOM, 0.0
                        )
                    else:
                        highest = gl.full((ROWS,), float("-inf"), gl.float32, gl.SliceLayout(1, LOGITS))
                    total = gl.zeros((ROWS,), gl.float32, gl.SliceLayout(1, LOGITS))
                    acc = warpgroup_mma_init(gl.zeros((ROWS, DIM), gl.float32, OUTPUT))
                    p = gl.zeros((ROWS, ROWS), q_buffer.dtype, WEIGHTS)
                    state = (highest, total, acc, p)
                    for step in range(full_tiles):
                        state = _step(q_buffer, buffers, bars, at + step, state, scale, whole, False, attempt == 0)
                    at += full_tiles  # said after the loop, since a number that only bounds loops is taken for unused
                    if tail is not None:
                        for first in range(0, listed_keys, ROWS):
                            inside = first + column
                            shape = gl.load(
                                tail + line * tail_width * 2 + inside // GROUP * 2 + 1, inside < listed_keys, other=0
                            )
                            bias = gl.where(inside % GROUP < (shape & 255), 0.0, float("-inf"))
                            state = _step(
                                q_buffer, buffers, bars, at + first // ROWS, state, scale, bias, True, attempt == 0
                            )
                        at += gl.cdiv(listed_keys, ROWS)
                    if proxies is not None:
                        for first in range(0, num_tiles, ROWS):
                            index = first + column
                            pooled = index < num_tiles
                            word = gl.load(kept + line * kept_width + index // 32, pooled, other=-1)
                            pooled &= ((word >> (index % 32)) & 1) == 0
                            bias = gl.load(log_size + index, pooled, other=float("-inf"))
                            state = _step(q_buffer, buffers, bars, at, state, scale, bias, True, attempt == 0)
                            at += 1
                    if coarse is not None:
                        dim = gl.arange(0, DIM, gl.SliceLayout(0, OUTPUT))
                        spread = gl.load(coarse + line * DIM + dim)[None, :]
                    highest, total, acc, p = state
                    acc, p = warpgroup_mma_wait(0, deps=(acc, p))

                    total = gl.convert_layout(total, gl.SliceLayout(1, OUTPUT))
                    highest = gl.convert_layout(highest, gl.SliceLayout(1, OUTPUT))
                    out = acc * (1.0 / total)[:, None]
                    if coarse is not None:
                        if gate is not None:
                            mbarrier.wait(bars[1].index(at % STAGES), at // STAGES & 1)
                            spread = spread * buffers[1].index(at % STAGES).load(OUTPUT).to(gl.float32)
                        out += spread
                    q_buffer.store(out.to(q_buffer.dtype))
                    lines = q_buffer.load(LINES)
                    tile = _query_tile(task, heads, num_tiles, grid, BLOCK)
                    offset, exists = _rows_of(tile, lines_in_full, grid, BLOCK, LINES)
                    gl.store(_lines_at(output, tile, output_strides, offset), lines, exists[:, None])
                    row, real = _rows_of(tile, rows_in_full, grid, BLOCK, OUTPUT)
                    item, head, first, size, extent_h, extent_w = tile
                    lse_at = lse + item.to(gl.int64) * lse_b + head.to(gl.int64) * (video_t * video_h * video_w) + first
                    gl.store(lse_at + row, (highest + gl.log2(total)) * LN2, real)
                    if attempt == 0:
                        lost = real & (total <= LEAST_TOTAL)
                        vanished |= lost.to(gl.int32)
                        gl.store(redo + task + gl.zeros_like(vanished), 1, lost)
                _take_query(q_buffer, buffers, bars, at)
                at += 1


@gluon.jit(do_not_specialize=(*SIZES, "tasks"))
def specialised_kernel(
    query,
    key,
    value,
    key_descriptor,
    value_descriptor,
    starts,
    tail,
    counts,
    kept,
    proxies,
    log_size,
    longest,
    reach,
    redo,
    coarse,
    gate,
    output,
    lse,
    scale,
    query_b,
    query_s,
    query_h,
    key_b,
    key_s,
    key_h,
    value_b,
    value_s,
    value_h,
    gate_b,
    gate_s,
    gate_h,
    output_b,
    output_s,
    output_h,
    lse_b,
    tasks,
    heads,
    batch_heads,
    num_tiles,
    top_k,
    tail_width,
    kept_width,
    video_t,
    video_h,
    video_w,
    tiles_h,
    tiles_w,
    BLOCK: gl.constexpr,
    GROUP: gl.constexpr,
    TILED: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):
    """Programs: as many as run at once; each takes every so-manieth query tile, head by head.

    TILED: `key` and `value` are the copy in tile order; the descriptors see its rows, and else boxes of the video.
    """
    dtype: gl.constexpr = query.dtype.element_ty
    q_buffer = gl.allocate_shared_memory(dtype, [ROWS, DIM], SHARED)
    keys = gl.allocate_shared_memory(dtype, [STAGES, ROWS, DIM], SHARED)
    values = gl.allocate_shared_memory(dtype, [STAGES, ROWS, DIM], SHARED)
    key_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    value_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    used = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    finished = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(key_ready.index(stage), count=1)
        mbarrier.init(value_ready.index(stage), count=1)
        mbarrier.init(used.index(stage), count=1)
    mbarrier.init(finished, count=1)
    bars = (key_ready, value_ready, used)
    buffers = (keys, values)
    grid = (video_t, video_h, video_w, tiles_h, tiles_w)
    lists = (starts, tail, counts, longest, reach, redo)
    numbers = (tasks, heads, batch_heads, num_tiles, top_k, tail_width, kept_width, scale)
    gl.warp_specialize(
        [
            (
                _consumer,
                (
                    (gate, proxies, coarse, kept, log_size),
                    (output, lse),
                    lists,
                    ((output_b, output_s, output_h), lse_b),
                    numbers,
                    grid,
                    q_buffer,
                    buffers,
                    bars,
                    finished,
                    BLOCK,
                    GROUP,
                    TILED,
                ),
            ),
            (
                _producer,
                (
                    (key, value, key_descriptor, value_descriptor, proxies),
                    lists,
                    (key_b, key_s, key_h, value_b, value_s, value_h),
                    (query, gate),
                    ((query_b, query_s, query_h), (gate_b, gate_s, gate_h)),
                    numbers,
                    grid,
                    buffers,
                    bars,
                    finished,
                    BLOCK,
                    GROUP,
                    TILED,
                ),
            ),
        ],
        [4],
        [PRODUCER_REGISTERS],
    )


PRODUCER_REGISTERS = 40  # of each thread that fetches; the others get what that leaves of 128


def can_specialise(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pooled: Pooled, problem: Problem
) -> bool:
    """Whether the kernel takes this call. Without a copy in tile order, tiles must have 64 tokens and sides that are
    powers of two, and heads must lie side by side."""
    if not may_specialise(query, problem) or pooled.rows is not None:
        return may_specialise(query, problem)
    return (
        problem.grid.tile_capacity == ROWS.value
        and all(side & (side - 1) == 0 for side in problem.grid.block_size)
        and all(x.stride(2) == DIM.value or x.shape[2] == 1 for x in (key, value))
        and all(stride % 8 == 0 for x in (key, value) for stride in x.stride()[:2])
        and all(x.data_ptr() % 16 == 0 for x in (key, value))
    )


def _rows_descriptor(rows: torch.Tensor) -> TensorDescriptor:
    """Of 64 rows of a tile-ordered copy `[P, V, D]`."""
    return TensorDescriptor.from_tensor(rows.view(-1, DIM.value), [ROWS.value, DIM.value], SHARED.value)


def _box_descriptor(x: torch.Tensor, grid: TileGrid) -> TensorDescriptor:
    """Of a full tile of one head of `[B, S, H, D]`."""
    batch, _, heads, dim = x.shape
    frames, height, width = grid.video_shape
    stride_b, stride_s = x.stride()[:2]
    return TensorDescriptor(
        x,
        [batch, frames, height, width, heads * dim],
        [stride_b, height * width * stride_s, width * stride_s, stride_s, 1],
        [1, *grid.block_size, dim],
        BOX.value,
    )


def attend(
    work: Work,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gate: torch.Tensor | None,
    pooled: Pooled,
    lists: Lists,
    output: torch.Tensor,
    lse: torch.Tensor,
    problem: Problem,
    programs: int,
) -> None:
    """What `attend` does, for calls that `can_specialise` allows, with as many `programs` as run at once."""
    batch, _, heads, dim = query.shape
    grid = problem.grid
    tiled = pooled.rows is not None
    if pooled.rows is not None:
        key, value = pooled.rows.unbind(0)
        descriptors = [_rows_descriptor(rows) for rows in (key, value)]
    else:
        descriptors = [_box_descriptor(x, grid) for x in (key, value)]
    tasks = grid.num_tiles * batch * heads
    programs = min(tasks, programs)
    redo = work.empty(lists.starts, (tasks + programs,))  # one of each: whether the task, whether any of the program
    work.launch(
        specialised_kernel,
        (programs,),
        query,
        key,
        value,
        *descriptors,
        lists.starts,
        lists.tail,
        lists.counts,
        lists.kept,
        pooled.proxies,
        pooled.log_size,
        pooled.longest,
        lists.reach,
        redo,
        lists.coarse,
        gate,
        output,
        lse,
        problem.scale * math.log2(math.e),
        *query.stride()[:3],
        *((0, 0, 0) if tiled else key.stride()[:3]),
        *((0, 0, 0) if tiled else value.stride()[:3]),
        *(query if gate is None else gate).stride()[:3],
        *output.stride()[:3],
        lse.stride(0),
        tasks,
        heads,
        batch * heads,
        grid.num_tiles,
        problem.top_k,
        0 if lists.tail is None else lists.tail.shape[3],
        0 if lists.kept is None else lists.kept.shape[3],
        *grid_arguments(grid),
        GROUP=GROUP,
        TILED=tiled,
        PRODUCER_REGISTERS=PRODUCER_REGISTERS,
        num_warps=4,
        maxnreg=128,
        enable_fp_fusion=False,
    )
