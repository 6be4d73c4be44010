"""The producer warps of the Hopper kernel: they fill the buffers, step by step, as soon as a stage is empty.

A step is one pair of buffers, key and value; `count` is how many came before it.
"""

# Tuples are taken apart whole, so that one sees what is in them.
# ruff: noqa: RUF059

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from ..primitives.geometry import unpack
from ..primitives.rows import block_offset, partial_rows
from ..primitives.softmax import MAX_BOUNDED_LOGIT
from .common import (
    BOX,
    PANEL_COLUMNS,
    ROWS,
    SHARED,
    load_task,
    query_tile,
    row_pointers,
    rows_exist,
    rows_layout,
    valid_context,
)
from .renamed import load_box, load_rows, reinterpret, synchronise

# Most polls of the chunk counter before a program goes on alone, one L2 round trip each; on short sequences all chunks
# together take less time than many polls in vain.
LONG_SPINS, SHORT_SPINS = gl.constexpr(1024), gl.constexpr(64)


@gluon.jit
def _wait_key_empty(barriers, count, STAGES: gl.constexpr):
    """Wait until the keys of step `count - STAGES` have been consumed."""
    mbarrier.wait(barriers[2].index(count % STAGES), (count // STAGES & 1) ^ 1)


@gluon.jit
def _wait_value_empty(barriers, count, STAGES: gl.constexpr):
    """Wait until the values of step `count - STAGES` have been consumed: the next step says so with its own keys."""
    if count >= STAGES:
        after = count + 1
        mbarrier.wait(barriers[2].index(after % STAGES), (after // STAGES & 1) ^ 1)


@gluon.jit
def _fetch_rows(key, value, key_offset, value_offset, exists, buffers, barriers, count):
    """Copy 64 rows of key and value, wherever they lie, into the buffers of step `count`, once they are empty."""
    keys, values = buffers
    STAGES: gl.constexpr = keys.shape[0]
    key_full, value_full, _ = barriers
    DIM: gl.constexpr = keys.shape[2]
    dim = gl.arange(0, DIM, gl.SliceLayout(0, rows_layout(DIM)))
    stage = count % STAGES
    mask = exists[:, None]
    _wait_key_empty(barriers, count, STAGES)
    load_rows(keys.index(stage), key + key_offset[:, None] + dim[None, :], mask=mask)
    async_copy.mbarrier_arrive(key_full.index(stage))
    _wait_value_empty(barriers, count, STAGES)
    load_rows(values.index(stage), value + value_offset[:, None] + dim[None, :], mask=mask)
    async_copy.mbarrier_arrive(value_full.index(stage))
    synchronise()  # every thread's copies are counted before the phase may end
    mbarrier.arrive(key_full.index(stage))
    mbarrier.arrive(value_full.index(stage))


@gluon.jit
def _copy(descriptor, corner, buffer, full, BLOCK: gl.constexpr):
    """Let the copy engine fill a buffer with 64 rows from `corner` on: a tile of the video, zeros for what would lie
    beyond it, or, without `BLOCK`, rows in tile order."""
    DIM: gl.constexpr = buffer.shape[1]
    if BLOCK is not None:
        buffer = reinterpret(buffer, buffer.dtype, [1, BLOCK[0], BLOCK[1], BLOCK[2], DIM], BOX)
    mbarrier.expect(full, ROWS * DIM * 2)
    load_box(descriptor, corner, full, buffer)


@gluon.jit
def _fetch_query_tile(source, descriptor, strides, tile, exists, in_full, grid, buffer, full, BLOCK: gl.constexpr):
    """Copy the rows of a query tile from a tensor `[B, S, H, D]`, query or gate; `None` for one that does not exist."""
    if source is None:
        mbarrier.arrive(full)
    elif descriptor is not None:
        batch, head, t, h, w, extent_t, extent_h, extent_w = tile
        _copy(descriptor, [batch, t, h, w, head * buffer.shape[1]], buffer, full, BLOCK)
    else:
        pointers = row_pointers(source, tile, strides, in_full, grid, buffer.shape[1])
        mask = (rows_exist(tile, BLOCK, rows_layout(buffer.shape[1])) & exists)[:, None]
        load_rows(buffer, pointers, mask=mask)
        async_copy.mbarrier_arrive(full)
        synchronise()
        mbarrier.arrive(full)


@gluon.jit
def _fetch_between(query, gate, next_tile, exists, tile, in_full, grid, buffers, barriers, count, BLOCK: gl.constexpr):
    """What lies between two query tiles: the query of the next one, where key goes, and this one's gate, where value
    goes."""
    query, query_descriptor, query_strides = query
    gate, gate_descriptor, gate_strides = gate
    keys, values = buffers
    STAGES: gl.constexpr = keys.shape[0]
    key_full, value_full, _ = barriers
    stage = count % STAGES
    to, full = keys.index(stage), key_full.index(stage)
    _wait_key_empty(barriers, count, STAGES)
    _fetch_query_tile(query, query_descriptor, query_strides, next_tile, exists, in_full, grid, to, full, BLOCK)
    to, full = values.index(stage), value_full.index(stage)
    _wait_value_empty(barriers, count, STAGES)
    _fetch_query_tile(gate, gate_descriptor, gate_strides, tile, True, in_full, grid, to, full, BLOCK)


@gluon.jit
def _fetch_tile(
    key_descriptor,
    value_descriptor,
    key_corner,
    value_corner,
    buffers,
    barriers,
    count,
    BLOCK: gl.constexpr = None,
):
    """Copy 64 rows of key and value that begin at these corners: tiles of the video, or, without `BLOCK`, rows that lie
    one after another."""
    keys, values = buffers
    STAGES: gl.constexpr = keys.shape[0]
    key_full, value_full, _ = barriers
    stage = count % STAGES
    _wait_key_empty(barriers, count, STAGES)
    _copy(key_descriptor, key_corner, keys.index(stage), key_full.index(stage), BLOCK)
    _wait_value_empty(barriers, count, STAGES)
    _copy(value_descriptor, value_corner, values.index(stage), value_full.index(stage), BLOCK)


@gluon.jit
def _copy_groups(descriptor, rows, buffer, full, GROUP: gl.constexpr):
    """Let the copy engine fill a buffer with the groups of rows that begin at `rows`."""
    DIM: gl.constexpr = buffer.shape[1]
    GROUPS: gl.constexpr = ROWS // GROUP
    pieces = reinterpret(buffer, buffer.dtype, [GROUPS * (DIM // PANEL_COLUMNS), GROUP, PANEL_COLUMNS], SHARED)
    mbarrier.expect(full, ROWS * DIM * 2)
    for piece in gl.static_range(GROUPS * (DIM // PANEL_COLUMNS)):
        corner = [rows[piece % GROUPS], piece // GROUPS * PANEL_COLUMNS]
        load_box(descriptor, corner, full, pieces.index(piece))


@gluon.jit
def _fetch_groups(groups, first_group, left, first_row, buffers, barriers, count, GROUP: gl.constexpr):
    """Copy the next 64 rows of a list of groups, of which so many rows are `left`, from the copy in tile order. Groups
    beyond the last one, and rows beyond a group's own, bring whatever lies there; they get no weight."""
    key_groups, value_groups = groups
    keys, values = buffers
    STAGES: gl.constexpr = keys.shape[0]
    key_full, value_full, _ = barriers
    stage = count % STAGES
    rows = ()
    for group in gl.static_range(ROWS // GROUP):
        start, shape = unpack(gl.load(first_group + group, group * GROUP < left, other=0))
        rows = rows + (first_row + start,)  # type: ignore[assignment]  # noqa: RUF005 - no stars here
    _wait_key_empty(barriers, count, STAGES)
    _copy_groups(key_groups, rows, keys.index(stage), key_full.index(stage), GROUP)
    _wait_value_empty(barriers, count, STAGES)
    _copy_groups(value_groups, rows, values.index(stage), value_full.index(stage), GROUP)


@gluon.jit
def _sync_before_chunk(chunk_counters, turn, chunk, sync_chunks, tasks, spins_left, MAX_SPINS: gl.constexpr):
    """Soft barrier of the whole grid before a chunk of the `turn`-th query tile's list, so that programs read the same
    keys at about the same time, most of them from L2.

    Counts this program in, and waits until all have begun the chunk before. It gives up after `spins_left` polls, since
    other work may hold the multiprocessor that a program waits for. Returns the polls left for the next chunk.
    """
    counter = turn * sync_chunks + chunk
    gl.atomic_add(chunk_counters + counter, 1, sem="relaxed")
    if counter > 0:
        before = chunk_counters + counter - 1
        all_programs = gl.minimum(tasks - (counter - 1) // sync_chunks * gl.num_programs(0), gl.num_programs(0))
        begun = gl.load(before, volatile=True)
        while (begun < all_programs) & (spins_left > 0):
            begun = gl.load(before, volatile=True)
            spins_left -= 1
        spins_left = gl.where(begun < all_programs, 0, MAX_SPINS)
    return spins_left


@gluon.jit
def producer(
    sources,
    context,
    lists,
    strides,
    query,
    gate,
    numbers,
    grid,
    pipeline,
    pace,
    BLOCK: gl.constexpr,
    GROUP: gl.constexpr,
    TILED: gl.constexpr,
    BY_ROWS: gl.constexpr,
):
    buffers, barriers, finished = pipeline
    chunk_counters, sync_chunks = pace
    key, value, key_descriptor, value_descriptor, groups, pooled_descriptor = sources
    context_key, context_value, context_mask, tokens_before, tokens_after = context
    full_tile_starts, partial_groups, list_lengths, max_norm, max_key_norm, needs_online = lists
    key_b, key_s, key_h, value_b, value_s, value_h = strides
    context_tokens = tokens_before + tokens_after
    tasks, heads, batch_heads, num_tiles, top_k, partial_width, bits_width, scale = numbers
    video_t, video_h, video_w, tiles_h, tiles_w = grid
    video_tokens = video_t * video_h * video_w
    DIM: gl.constexpr = buffers[0].shape[2]
    slot = gl.arange(0, ROWS, gl.SliceLayout(1, rows_layout(DIM))) if BY_ROWS else 0
    in_full = block_offset(slot, video_h, video_w, BLOCK) if BY_ROWS else None
    count = 0
    MAX_SPINS: gl.constexpr = LONG_SPINS if TILED else SHORT_SPINS  # only long sequences are copied
    spins_left = gl.to_tensor(MAX_SPINS)
    repeat = True
    for attempt in gl.static_range(2):
        if attempt == 1:
            mbarrier.wait(finished, 0)
            repeat = gl.load(needs_online + tasks + gl.program_id(0)) > 0
        synchronised = (sync_chunks > 0) & (attempt == 0)
        if repeat:
            following = load_task(gl.program_id(0), lists, numbers, GROUP)
            tile = query_tile(gl.program_id(0), heads, num_tiles, grid, BLOCK)
            no_gate = (None, None, None)
            _fetch_between(query, no_gate, tile, True, tile, in_full, grid, buffers, barriers, count, BLOCK)
            count += 1
            for task in range(gl.program_id(0), tasks, gl.num_programs(0)):
                bound, full_tiles, listed_keys, next_start = following
                following = load_task(task + gl.num_programs(0), lists, numbers, GROUP)
                turn = task // gl.num_programs(0)
                if attempt == 0:
                    mine = bound < MAX_BOUNDED_LOGIT
                else:
                    mine = gl.load(needs_online + task) > 0
                if mine:
                    batch_head = gl.cast(task // num_tiles, gl.int64)
                    row = gl.cast(task, gl.int64)
                    list_at = full_tile_starts + row * top_k
                    key_base, value_base = key, value
                    batch, head = task // num_tiles // heads, task // num_tiles % heads
                    if TILED:
                        first_row = (batch_head * video_tokens).to(gl.int32)
                    else:
                        key_base += batch.to(gl.int64) * key_b + head.to(gl.int64) * key_h
                        value_base += batch.to(gl.int64) * value_b + head.to(gl.int64) * value_h
                    list_chunks = gl.maximum(sync_chunks, 1)
                    chunk_tiles = gl.cdiv(full_tiles, list_chunks)
                    for chunk in range(list_chunks):
                        if synchronised:
                            spins_left = _sync_before_chunk(
                                chunk_counters, turn, chunk, sync_chunks, tasks, spins_left, MAX_SPINS
                            )
                        for step in range(chunk * chunk_tiles, gl.minimum((chunk + 1) * chunk_tiles, full_tiles)):
                            start = next_start
                            next_start = gl.load(list_at + step + 1, mask=step + 1 < full_tiles, other=0)
                            if TILED:
                                corner = [first_row + start, 0]
                                _fetch_tile(key_descriptor, value_descriptor, corner, corner, buffers, barriers, count)
                            else:
                                corner = [
                                    batch,
                                    start // (video_h * video_w),
                                    start // video_w % video_h,
                                    start % video_w,
                                    head * DIM,
                                ]
                                _fetch_tile(
                                    key_descriptor,
                                    value_descriptor,
                                    corner,
                                    corner,
                                    buffers,
                                    barriers,
                                    count,
                                    BLOCK,
                                )
                            count += 1
                    if partial_groups is not None:
                        for first in range(0, listed_keys, ROWS):
                            first_group = partial_groups + row * partial_width
                            if TILED:
                                first_group += first // GROUP
                                _fetch_groups(
                                    groups,
                                    first_group,
                                    listed_keys - first,
                                    first_row,
                                    buffers,
                                    barriers,
                                    count,
                                    GROUP,
                                )
                            else:
                                listed = first + slot
                                rows, exists = partial_rows(
                                    first_group, listed, listed < listed_keys, video_h, video_w, False, GROUP
                                )
                                rows = rows.to(gl.int64)
                                _fetch_rows(
                                    key_base,
                                    value_base,
                                    rows * key_s,
                                    rows * value_s,
                                    exists,
                                    buffers,
                                    barriers,
                                    count,
                                )
                            count += 1
                    if pooled_descriptor is not None:
                        for first in range(0, num_tiles, ROWS):
                            mean_key = (task // num_tiles) * num_tiles + first
                            mean_value = mean_key + batch_heads * num_tiles
                            corners = [mean_key, 0], [mean_value, 0]
                            _fetch_tile(
                                pooled_descriptor,
                                pooled_descriptor,
                                corners[0],
                                corners[1],
                                buffers,
                                barriers,
                                count,
                            )
                            count += 1
                    if context_key is not None:
                        item_key = context_key + batch.to(gl.int64) * key_b + head.to(gl.int64) * key_h
                        item_value = context_value + batch.to(gl.int64) * value_b + head.to(gl.int64) * value_h
                        for first in range(0, context_tokens, ROWS):
                            index = first + slot
                            token = gl.where(index < tokens_before, index, index + video_tokens).to(gl.int64)
                            exists = valid_context(context_mask, batch, index, context_tokens)
                            _fetch_rows(
                                item_key,
                                item_value,
                                token * key_s,
                                token * value_s,
                                exists,
                                buffers,
                                barriers,
                                count,
                            )
                            count += 1
                elif synchronised:
                    for chunk in range(sync_chunks):
                        gl.atomic_add(chunk_counters + turn * sync_chunks + chunk, 1, sem="relaxed")
                next_task = task + gl.num_programs(0)
                next_tile = query_tile(next_task, heads, num_tiles, grid, BLOCK)
                more = next_task < tasks
                _fetch_between(query, gate, next_tile, more, tile, in_full, grid, buffers, barriers, count, BLOCK)
                count += 1
                tile = next_tile
