"""The fetching warps of the specialised kernel: they fill the buffers, step by step, as soon as there is room."""

# Tuples are taken apart whole, so that one sees what is in them.
# ruff: noqa: RUF059

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from ..primitives.geometry import unpack
from ..primitives.rows import block_offset, tail_rows
from ..primitives.softmax import FARTHEST
from .common import (
    BOX,
    COLUMNS,
    ROWS,
    SHARED,
    STAGES,
    ahead,
    lines_at,
    lines_layout,
    query_tile,
    rows_exist,
    valid_context,
)

# Looks at others' progress, each a way to L2 and back, on long sequences and on short ones, where parts take so little
# time that a long wait in vain would cost more than all of them.
LONG_LOOKS, SHORT_LOOKS = gl.constexpr(1024), gl.constexpr(64)
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
    DIM: gl.constexpr = keys.shape[2]
    dim = gl.arange(0, DIM, gl.SliceLayout(0, lines_layout(DIM)))
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
def _copy(descriptor, corner, buffer, ready, BLOCK: gl.constexpr):
    """Let the copy engine fill a buffer with 64 rows from `corner` on: a tile of the video, zeros for what would lie
    beyond it, or, without `BLOCK`, rows in tile order."""
    DIM: gl.constexpr = buffer.shape[1]
    if BLOCK is not None:
        buffer = buffer._reinterpret(buffer.dtype, [1, BLOCK[0], BLOCK[1], BLOCK[2], DIM], BOX)
    mbarrier.expect(ready, ROWS * DIM * 2)
    tma.async_copy_global_to_shared(descriptor, corner, ready, buffer)


@gluon.jit
def _fetch_query_tile(source, descriptor, strides, tile, exists, in_full, grid, buffer, ready, BLOCK: gl.constexpr):
    """Copy the rows of a query tile from a tensor `[B, S, H, D]`, query or gate; `None` for one that does not exist."""
    if source is None:
        mbarrier.arrive(ready)
    elif descriptor is not None:
        item, head, t, h, w, extent_t, extent_h, extent_w = tile
        _copy(descriptor, [item, t, h, w, head * buffer.shape[1]], buffer, ready, BLOCK)
    else:
        lines = lines_at(source, tile, strides, in_full, grid, buffer.shape[1])
        mask = (rows_exist(tile, BLOCK, lines_layout(buffer.shape[1])) & exists)[:, None]
        async_copy.async_copy_global_to_shared(buffer, lines, mask=mask)
        async_copy.mbarrier_arrive(ready)
        synchronise()
        mbarrier.arrive(ready)


@gluon.jit
def _fetch_between(query, gate, next_tile, exists, tile, in_full, grid, buffers, bars, at, BLOCK: gl.constexpr):
    """What lies between two query tiles: the query of the next one, where key goes, and this one's gate, where value
    goes."""
    query, query_descriptor, query_strides = query
    gate, gate_descriptor, gate_strides = gate
    keys, values = buffers
    key_ready, value_ready, _ = bars
    slot = at % STAGES
    to, ready = keys.index(slot), key_ready.index(slot)
    _await_key_room(bars, at)
    _fetch_query_tile(query, query_descriptor, query_strides, next_tile, exists, in_full, grid, to, ready, BLOCK)
    to, ready = values.index(slot), value_ready.index(slot)
    _await_value_room(bars, at)
    _fetch_query_tile(gate, gate_descriptor, gate_strides, tile, True, in_full, grid, to, ready, BLOCK)


@gluon.jit
def _fetch_tile(
    key_descriptor, value_descriptor, key_corner, value_corner, buffers, bars, at, BLOCK: gl.constexpr = None
):
    """Copy 64 rows of key and value that begin at these corners: tiles of the video, or, without `BLOCK`, rows that lie
    one after another."""
    keys, values = buffers
    key_ready, value_ready, _ = bars
    slot = at % STAGES
    _await_key_room(bars, at)
    _copy(key_descriptor, key_corner, keys.index(slot), key_ready.index(slot), BLOCK)
    _await_value_room(bars, at)
    _copy(value_descriptor, value_corner, values.index(slot), value_ready.index(slot), BLOCK)


@gluon.jit
def _copy_groups(descriptor, rows, buffer, ready, GROUP: gl.constexpr):
    """Let the copy engine fill a buffer with the groups of rows that begin at `rows`."""
    DIM: gl.constexpr = buffer.shape[1]
    GROUPS: gl.constexpr = ROWS // GROUP
    pieces = buffer._reinterpret(buffer.dtype, [GROUPS * (DIM // COLUMNS), GROUP, COLUMNS], SHARED)
    mbarrier.expect(ready, ROWS * DIM * 2)
    for piece in gl.static_range(GROUPS * (DIM // COLUMNS)):
        corner = [rows[piece % GROUPS], piece // GROUPS * COLUMNS]
        tma.async_copy_global_to_shared(descriptor, corner, ready, pieces.index(piece))


@gluon.jit
def _fetch_groups(groups, entry, left, first_row, buffers, bars, at, GROUP: gl.constexpr):
    """Copy the next 64 rows of a list of groups, of which so many rows are `left`, from the copy in tile order. Groups
    beyond the last one, and rows beyond a group's own, bring whatever lies there; they get no weight."""
    key_groups, value_groups = groups
    keys, values = buffers
    key_ready, value_ready, _ = bars
    slot = at % STAGES
    rows = ()
    for group in gl.static_range(ROWS // GROUP):
        start, shape = unpack(gl.load(entry + group, group * GROUP < left, other=0))
        rows = rows + (first_row + start,)  # type: ignore[assignment]  # noqa: RUF005 - no stars here
    _await_key_room(bars, at)
    _copy_groups(key_groups, rows, keys.index(slot), key_ready.index(slot), GROUP)
    _await_value_room(bars, at)
    _copy_groups(value_groups, rows, values.index(slot), value_ready.index(slot), GROUP)


@gluon.jit
def _begin_part(progress, turn, part, parts, tasks, patience, LOOKS: gl.constexpr):
    """Count this program among those that have begun a part of the list of their so-manieth query tile, and wait until
    every program has begun the part before; so they read the same keys at about the same time, and most of those
    from L2.

    Who waits in vain, since other work occupies the place of a program, goes on without. Returns the patience left.
    """
    at = turn * parts + part
    gl.atomic_add(progress + at, 1, sem="relaxed")
    if at > 0:
        before = progress + at - 1
        all_programs = gl.minimum(tasks - (at - 1) // parts * gl.num_programs(0), gl.num_programs(0))
        begun = gl.load(before, volatile=True)
        while (begun < all_programs) & (patience > 0):
            begun = gl.load(before, volatile=True)
            patience -= 1
        patience = gl.where(begun < all_programs, 0, LOOKS)
    return patience


@gluon.jit
def fetch(
    sources,
    context,
    lists,
    strides,
    query,
    gate,
    numbers,
    grid,
    ring,
    pace,
    BLOCK: gl.constexpr,
    GROUP: gl.constexpr,
    TILED: gl.constexpr,
    BY_ROWS: gl.constexpr,
):
    buffers, bars, finished = ring
    progress, parts = pace
    key, value, key_descriptor, value_descriptor, groups, proxy_descriptor = sources
    context_key, context_value, context_mask, tokens_before, tokens_after = context
    starts, tail, counts, longest, reach, redo = lists
    key_b, key_s, key_h, value_b, value_s, value_h = strides
    context_tokens = tokens_before + tokens_after
    tasks, heads, batch_heads, num_tiles, top_k, tail_width, kept_width, scale = numbers
    video_t, video_h, video_w, tiles_h, tiles_w = grid
    video_tokens = video_t * video_h * video_w
    DIM: gl.constexpr = buffers[0].shape[2]
    slot = gl.arange(0, ROWS, gl.SliceLayout(1, lines_layout(DIM))) if BY_ROWS else 0
    in_full = block_offset(slot, video_h, video_w, BLOCK) if BY_ROWS else None
    at = 0
    LOOKS: gl.constexpr = LONG_LOOKS if TILED else SHORT_LOOKS  # only long sequences are copied
    patience = gl.to_tensor(LOOKS)
    repeat = True
    for attempt in gl.static_range(2):
        if attempt == 1:
            mbarrier.wait(finished, 0)
            repeat = gl.load(redo + tasks + gl.program_id(0)) > 0
        in_step = (parts > 0) & (attempt == 0)
        if repeat:
            following = ahead(gl.program_id(0), lists, numbers, GROUP)
            tile = query_tile(gl.program_id(0), heads, num_tiles, grid, BLOCK)
            no_gate = (None, None, None)
            _fetch_between(query, no_gate, tile, True, tile, in_full, grid, buffers, bars, at, BLOCK)
            at += 1
            for task in range(gl.program_id(0), tasks, gl.num_programs(0)):
                bound, full_tiles, listed_keys, next_start = following
                following = ahead(task + gl.num_programs(0), lists, numbers, GROUP)
                turn = task // gl.num_programs(0)
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
                    else:
                        key_base += item.to(gl.int64) * key_b + head.to(gl.int64) * key_h
                        value_base += item.to(gl.int64) * value_b + head.to(gl.int64) * value_h
                    list_parts = gl.maximum(parts, 1)
                    part_tiles = gl.cdiv(full_tiles, list_parts)
                    for part in range(list_parts):
                        if in_step:
                            patience = _begin_part(progress, turn, part, parts, tasks, patience, LOOKS)
                        for step in range(part * part_tiles, gl.minimum((part + 1) * part_tiles, full_tiles)):
                            start = next_start
                            next_start = gl.load(list_at + step + 1, mask=step + 1 < full_tiles, other=0)
                            if TILED:
                                corner = [first_row + start, 0]
                                _fetch_tile(key_descriptor, value_descriptor, corner, corner, buffers, bars, at)
                            else:
                                corner = [
                                    item,
                                    start // (video_h * video_w),
                                    start // video_w % video_h,
                                    start % video_w,
                                    head * DIM,
                                ]
                                _fetch_tile(key_descriptor, value_descriptor, corner, corner, buffers, bars, at, BLOCK)
                            at += 1
                    if tail is not None:
                        for first in range(0, listed_keys, ROWS):
                            entry = tail + line * tail_width
                            if TILED:
                                entry += first // GROUP
                                _fetch_groups(groups, entry, listed_keys - first, first_row, buffers, bars, at, GROUP)
                            else:
                                listed = first + slot
                                rows, exists = tail_rows(
                                    entry, listed, listed < listed_keys, video_h, video_w, False, GROUP
                                )
                                rows = rows.to(gl.int64)
                                _fetch_rows(
                                    key_base, value_base, rows * key_s, rows * value_s, exists, buffers, bars, at
                                )
                            at += 1
                    if proxy_descriptor is not None:
                        for first in range(0, num_tiles, ROWS):
                            mean_key = (task // num_tiles) * num_tiles + first
                            mean_value = mean_key + batch_heads * num_tiles
                            corners = [mean_key, 0], [mean_value, 0]
                            _fetch_tile(proxy_descriptor, proxy_descriptor, corners[0], corners[1], buffers, bars, at)
                            at += 1
                    if context_key is not None:
                        item_key = context_key + item.to(gl.int64) * key_b + head.to(gl.int64) * key_h
                        item_value = context_value + item.to(gl.int64) * value_b + head.to(gl.int64) * value_h
                        for first in range(0, context_tokens, ROWS):
                            index = first + slot
                            token = gl.where(index < tokens_before, index, index + video_tokens).to(gl.int64)
                            exists = valid_context(context_mask, item, index, context_tokens)
                            _fetch_rows(item_key, item_value, token * key_s, token * value_s, exists, buffers, bars, at)
                            at += 1
                elif in_step:
                    for part in range(parts):
                        gl.atomic_add(progress + turn * parts + part, 1, sem="relaxed")
                next_task = task + gl.num_programs(0)
                next_tile = query_tile(next_task, heads, num_tiles, grid, BLOCK)
                more = next_task < tasks
                _fetch_between(query, gate, next_tile, more, tile, in_full, grid, buffers, bars, at, BLOCK)
                at += 1
                tile = next_tile
