"""The consumer warps of the Hopper kernel: products, softmax, output and log-sum-exp of query tiles in turn."""

# Tuples are taken apart whole, so that one sees what is in them.
# ruff: noqa: RUF059

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from ..primitives.geometry import unpack
from ..primitives.rows import block_offset
from ..primitives.softmax import HEADROOM, LN2, MAX_BOUNDED_LOGIT, MIN_ROW_SUM
from .common import (
    BOX,
    LOGITS,
    ROWS,
    THREAD_BITS,
    first_token,
    load_task,
    output_layout,
    query_tile,
    row_pointers,
    rows_exist,
    rows_layout,
    valid_context,
)
from .renamed import OPERANDS_APART, reinterpret, store_box


@gluon.jit
def _column_before(column, end):
    """Whether a column of the logits lies before `end`.

    The columns of a thread follow from its first one and from what is known when compiling. With the latter at the side
    of `end`, a loop keeps one number in a register, and not one for each column.
    """
    return (column & THREAD_BITS) < end - (column & ~THREAD_BITS)


@gluon.jit
def _column_bit(word, column):
    """Bit `column % 32` of a word, in two shifts for the same reason."""
    return ((word >> (column & THREAD_BITS)) >> (column & (31 & ~THREAD_BITS))) & 1


@gluon.jit
def _not_before_here(number):
    """The same number, not known to be, so that nothing is worked out from it further up. From Triton 3.8 on the second
    product's addresses would be, between the instructions of the first."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [number], gl.int32, is_pure=False, pack=1)


@gluon.jit
def _step(
    q,
    buffers,
    barriers,
    count,
    state,
    scale,
    bias,
    FENCE: gl.constexpr,
    BOUNDED: gl.constexpr,
    LEAVE: gl.constexpr = True,
):
    """One step of the softmax in base 2.

    Args:
        state: highest logit (or the fixed offset), sums and outputs so far, and the weights that may still be read.
        FENCE: the buffers were filled by threads, not by the copy engine.
        LEAVE: the product with the values is left running, and the next step waits for it.
    """
    keys, values = buffers
    STAGES: gl.constexpr = keys.shape[0]
    key_full, value_full, empty = barriers
    row_max, row_sum, acc, p = state
    OUTPUT: gl.constexpr = output_layout(values.shape[2])
    stage = count % STAGES
    phase = count // STAGES & 1
    mbarrier.wait(key_full.index(stage), phase)
    if FENCE:
        fence_async_shared()
    s = warpgroup_mma(
        q, keys.index(stage).permute((1, 0)), gl.zeros((ROWS, ROWS), gl.float32, LOGITS), use_acc=False, is_async=True
    )
    s, acc, p = warpgroup_mma_wait(0, deps=(s, acc, p))
    mbarrier.arrive(empty.index(stage))
    if BOUNDED:
        shift = -row_max[:, None]
        if bias is not None:
            shift = bias[None, :] - row_max[:, None]
        weights = gl.exp2(gl.fma(s, gl.to_tensor(scale), shift))
        row_sum += gl.sum(weights, 1)
    else:
        s = s * scale
        if bias is not None:
            s += bias[None, :]
        new_max = gl.maximum(row_max, gl.max(s, 1))
        weights = gl.exp2(s - new_max[:, None])
        rescale = gl.exp2(row_max - new_max)
        row_sum = row_sum * rescale + gl.sum(weights, 1)
        acc = acc * gl.convert_layout(rescale, gl.SliceLayout(1, OUTPUT))[:, None]
        row_max = new_max
    p = gl.convert_layout(weights.to(values.dtype), gl.DotOperandLayout(0, OUTPUT, 2))
    mbarrier.wait(value_full.index(stage), phase)
    if FENCE:
        fence_async_shared()
    acc = warpgroup_mma(p, values.index(_not_before_here(stage)), acc, is_async=True)
    if not LEAVE:
        acc, p = warpgroup_mma_wait(0, deps=(acc, p))
    return row_max, row_sum, acc, p


@gluon.jit
def _take_query(q, buffers, barriers, count):
    """Move the next tile's query from where keys arrive to where it stays.

    Both barriers of this stage are waited for even where the tile is skipped, or the next phase parity would be wrong.
    """
    keys, values = buffers
    STAGES: gl.constexpr = keys.shape[0]
    key_full, value_full, empty = barriers
    stage = count % STAGES
    phase = count // STAGES & 1
    mbarrier.wait(key_full.index(stage), phase)
    mbarrier.wait(value_full.index(stage), phase)
    q.store(keys.index(stage).load(rows_layout(q.shape[1])))
    fence_async_shared()
    mbarrier.arrive(empty.index(stage))


@gluon.jit
def _await_writes():
    """Wait until what the copy engine was told to write is written; `tma.store_wait` only waits until it is read."""
    gl.inline_asm_elementwise("cp.async.bulk.wait_group 0; // $0", "=r", [], gl.int32, is_pure=False, pack=1)


@gluon.jit
def consumer(
    sources,
    targets,
    context,
    lists,
    strides,
    numbers,
    grid,
    q_buffer,
    pipeline,
    BLOCK: gl.constexpr,
    GROUP: gl.constexpr,
    TILED: gl.constexpr,
):
    buffers, barriers, finished = pipeline
    gate, pooled_kv, coarse, selected_bits, log_size = sources
    output, output_descriptor, lse = targets
    context_key, context_value, context_mask, tokens_before, tokens_after = context
    context_tokens = tokens_before + tokens_after
    full_tile_starts, partial_groups, list_lengths, max_norm, max_key_norm, needs_online = lists
    output_strides, lse_b = strides
    tasks, heads, batch_heads, num_tiles, top_k, partial_width, bits_width, scale = numbers
    video_t, video_h, video_w, tiles_h, tiles_w = grid
    TILE: gl.constexpr = BLOCK[0] * BLOCK[1] * BLOCK[2]
    DIM: gl.constexpr = q_buffer.shape[1]
    STAGES: gl.constexpr = buffers[0].shape[0]
    dtype: gl.constexpr = q_buffer.dtype
    ROWS_LAYOUT: gl.constexpr = rows_layout(DIM)
    OUTPUT: gl.constexpr = output_layout(DIM)
    # Whether short loops may leave a product running, as the main loop always does. Where operands lie apart there are
    # too few registers for it at head_dim 64 without a gate, and the assembler would make every product wait.
    LEAVE: gl.constexpr = DIM == 128 or coarse is not None or not OPERANDS_APART
    column = gl.arange(0, ROWS, gl.SliceLayout(0, LOGITS))
    whole = gl.where(column < TILE, 0.0, float("-inf")) if TILE != ROWS else None
    offsets_in_full = block_offset(gl.arange(0, ROWS, gl.SliceLayout(1, ROWS_LAYOUT)), video_h, video_w, BLOCK)
    output_offsets = block_offset(gl.arange(0, ROWS, gl.SliceLayout(1, OUTPUT)), video_h, video_w, BLOCK)
    underflowed = gl.zeros((ROWS,), gl.int32, gl.SliceLayout(1, OUTPUT))
    count = 0
    redo_count = 0
    repeat = True
    for attempt in gl.static_range(2):
        if attempt == 1:
            redo_count += gl.max(underflowed, 0)
            gl.store(needs_online + tasks + gl.program_id(0), redo_count)
            if output_descriptor is not None:
                _await_writes()  # of tiles that are about to be written again
            mbarrier.arrive(finished)
            repeat = redo_count > 0
        if repeat:
            next_bound, next_full, next_keys, _ = load_task(gl.program_id(0), lists, numbers, GROUP)
            _take_query(q_buffer, buffers, barriers, count)
            count += 1
            for task in range(gl.program_id(0), tasks, gl.num_programs(0)):
                bound, full_tiles, listed_keys = next_bound, next_full, next_keys
                next_bound, next_full, next_keys, _ = load_task(task + gl.num_programs(0), lists, numbers, GROUP)
                if attempt == 0:
                    mine = bound < MAX_BOUNDED_LOGIT
                    redo_count += gl.where(mine, 0, 1)
                    gl.store(needs_online + task, gl.where(mine, 0, 1))
                else:
                    mine = gl.load(needs_online + task) > 0
                if mine:
                    row = gl.cast(task, gl.int64)
                    if attempt == 0:
                        row_max = gl.full((ROWS,), 0.0, gl.float32, gl.SliceLayout(1, LOGITS)) + gl.maximum(
                            bound - HEADROOM, 0.0
                        )
                    else:
                        row_max = gl.full((ROWS,), float("-inf"), gl.float32, gl.SliceLayout(1, LOGITS))
                    row_sum = gl.zeros((ROWS,), gl.float32, gl.SliceLayout(1, LOGITS))
                    acc = warpgroup_mma_init(gl.zeros((ROWS, DIM), gl.float32, OUTPUT))
                    p = gl.zeros((ROWS, ROWS), dtype, gl.DotOperandLayout(0, OUTPUT, 2))
                    state = (row_max, row_sum, acc, p)
                    for step in range(full_tiles):
                        state = _step(
                            q_buffer, buffers, barriers, count + step, state, scale, whole, False, attempt == 0
                        )
                    # After the loop, not in it: what one round of `task` hands to the next and only bounds an inner
                    # loop is dropped by Triton (3.6 to 3.9), and the first tile's number of steps serves all.
                    count += full_tiles
                    if partial_groups is not None:
                        for first in range(0, listed_keys, ROWS):
                            first_group = partial_groups + row * partial_width + first // GROUP
                            end = gl.zeros_like(column)  # of the rows that the group of a column holds
                            for group in gl.static_range(ROWS // GROUP):
                                listed = first + group * GROUP < listed_keys
                                start, shape = unpack(gl.load(first_group + group, listed, other=0))
                                end = gl.where(column // GROUP == group, group * GROUP + (shape & 255), end)
                            bias = gl.where(_column_before(column, end), 0.0, float("-inf"))
                            state = _step(
                                q_buffer,
                                buffers,
                                barriers,
                                count + first // ROWS,
                                state,
                                scale,
                                bias,
                                not TILED,
                                attempt == 0,
                                LEAVE,
                            )
                        count += gl.cdiv(listed_keys, ROWS)
                    if pooled_kv is not None:
                        for first in range(0, num_tiles, ROWS):
                            words = selected_bits + row * bits_width + first // 32
                            word = gl.where(column < 32, gl.load(words), gl.load(words + 1))
                            pooled = _column_before(column, num_tiles - first) & (_column_bit(word, column) == 0)
                            bias = gl.where(pooled, gl.load(log_size + first + column), float("-inf"))
                            state = _step(
                                q_buffer, buffers, barriers, count, state, scale, bias, False, attempt == 0, LEAVE
                            )
                            count += 1
                    video_sum = state[1]
                    if context_key is not None:  # online, since nothing bounds its logits
                        for first in range(0, context_tokens, ROWS):
                            there = valid_context(
                                context_mask, task // num_tiles // heads, first + column, context_tokens
                            )
                            bias = gl.where(there, 0.0, float("-inf"))
                            state = _step(q_buffer, buffers, barriers, count, state, scale, bias, True, False, LEAVE)
                            count += 1
                    if coarse is not None:
                        dim = gl.arange(0, DIM, gl.SliceLayout(0, OUTPUT))
                        spread = gl.load(coarse + row * DIM + dim)[None, :]
                    row_max, row_sum, acc, p = state
                    acc, p = warpgroup_mma_wait(0, deps=(acc, p))
                    _take_query(q_buffer, buffers, barriers, count)  # so that the next tile's keys come meanwhile
                    row_sum = gl.convert_layout(row_sum, gl.SliceLayout(1, OUTPUT))
                    row_max = gl.convert_layout(row_max, gl.SliceLayout(1, OUTPUT))
                    out = acc * (1.0 / row_sum)[:, None]
                    staged = buffers[1].index(count % STAGES)  # where the gate has arrived; nobody else wants it now
                    if coarse is not None:
                        if gate is not None:
                            # It has arrived with the query; but unless it is waited for here, registers are spilled.
                            mbarrier.wait(barriers[1].index(count % STAGES), count // STAGES & 1)
                            spread = spread * staged.load(OUTPUT).to(gl.float32)
                        out += spread
                    tile = query_tile(task, heads, num_tiles, grid, BLOCK)
                    staged.store(out.to(dtype))
                    if output_descriptor is not None:
                        fence_async_shared()
                        batch, head, t, h, w, _, _, _ = tile
                        box = reinterpret(staged, dtype, [1, BLOCK[0], BLOCK[1], BLOCK[2], DIM], BOX)
                        store_box(output_descriptor, [batch, t, h, w, head * DIM], box)
                    else:
                        exists = rows_exist(tile, BLOCK, ROWS_LAYOUT)[:, None]
                        at_output = row_pointers(output, tile, output_strides, offsets_in_full, grid, DIM)
                        gl.store(at_output, staged.load(ROWS_LAYOUT), exists)
                        fence_async_shared()  # the copy engine fills this place next
                    real = rows_exist(tile, BLOCK, OUTPUT)
                    lse_at = lse + tile[0].to(gl.int64) * lse_b
                    lse_at += tile[1].to(gl.int64) * (video_t * video_h * video_w + context_tokens) + first_token(
                        tile, grid
                    )
                    gl.store(lse_at + output_offsets, (row_max + gl.log2(row_sum)) * LN2, real)
                    if attempt == 0:
                        lost = real & (gl.convert_layout(video_sum, gl.SliceLayout(1, OUTPUT)) <= MIN_ROW_SUM)
                        underflowed |= lost.to(gl.int32)
                        gl.store(needs_online + task + gl.zeros_like(underflowed), 1, lost)
                    if output_descriptor is not None:
                        tma.store_wait(0)  # before the next tile gives this place away
                else:
                    _take_query(q_buffer, buffers, barriers, count)
                count += 1
