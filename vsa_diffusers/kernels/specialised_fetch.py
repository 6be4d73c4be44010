"""The fetching warps of the specialised kernel: they fill the buffers, step by step, as soon as there is room."""

# Tuples are taken apart whole, so that one sees what is in them.
# ruff: noqa: RUF059

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from .attend import FARTHEST
from .rows import block_offset, tail_rows
from .specialised_common import BOX, DIM, LINES, ROWS, STAGES, ahead, lines_at, query_tile, rows_in_tile

synchronise = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # renamed in Triton 3.7


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
    synchronise()  # every thread's copies are counted before the phase may end
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
    offset, inside = rows_in_tile(next_tile, in_full, grid, BLOCK, LINES)
    lines = lines_at(query, next_tile, query_strides, offset)
    async_copy.async_copy_global_to_shared(keys.index(slot), lines, mask=(inside & exists)[:, None])
    async_copy.mbarrier_arrive(key_ready.index(slot))
    _await_value_room(bars, at)
    if gate is not None:
        offset, inside = rows_in_tile(tile, in_full, grid, BLOCK, LINES)
        lines = lines_at(gate, tile, gate_strides, offset)
        async_copy.async_copy_global_to_shared(values.index(slot), lines, mask=inside[:, None])
        async_copy.mbarrier_arrive(value_ready.index(slot))
    synchronise()
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
def fetch(
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
            following = ahead(gl.program_id(0), lists, numbers, GROUP)
            tile = query_tile(gl.program_id(0), heads, num_tiles, grid, BLOCK)
            _fetch_lines((query, query_strides, tile, True, None, None, tile), inside, grid, buffers, bars, at, BLOCK)
            at += 1
            for task in range(gl.program_id(0), tasks, gl.num_programs(0)):
                bound, full_tiles, listed_keys, next_start = following
                following = ahead(task + gl.num_programs(0), lists, numbers, GROUP)
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
                next_tile = query_tile(next_task, heads, num_tiles, grid, BLOCK)
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
