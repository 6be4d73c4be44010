"""The sparse kernel for Hopper, in Gluon: producer warps fetch keys and values, consumer warps multiply.

What it computes is what `sparse/forward.py` does, in the same order. What differs is who waits for whom: producers run
ahead of consumers, across the ends of query tiles, as far as the buffers reach. A program takes query tile
after query tile, so that the last steps of one hide the first loads of the next.

Tiles whose logits might not fit the bounded softmax, or turn out not to have, are done again at the end, online.

M = 64 query rows, K_N = 64 keys of one step, D = 64 or 128.
"""

from __future__ import annotations

import math

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ...problem import Problem
from ...tiles import TileGrid
from ..arguments import grid_arguments, has_boxes, list_arguments, size_arguments, strides
from ..buffers import ForwardTensors, PooledTiles, SelectedTiles
from ..plans import HopperLaunch
from ..primitives.geometry import SIZES, SLICED
from ..primitives.tile_lists import GROUP
from ..recording import Launcher, form_of
from .common import BOX, PANEL_COLUMNS, ROWS, SHARED
from .consumer import consumer
from .producer import producer


@gluon.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=SLICED)
def hopper_forward_kernel(
    query,
    key,
    value,
    query_descriptor,
    key_descriptor,
    value_descriptor,
    gate_descriptor,
    output_descriptor,
    key_groups,
    value_groups,
    pooled_descriptor,
    full_tile_starts,
    partial_groups,
    list_lengths,
    selected_bits,
    pooled_kv,
    log_size,
    max_norm,
    max_key_norm,
    needs_online,
    chunk_counters,
    coarse,
    gate,
    output,
    lse,
    context_key,
    context_value,
    context_mask,
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
    sync_chunks,
    tasks,
    heads,
    batch_heads,
    num_tiles,
    top_k,
    partial_width,
    bits_width,
    tokens_before,
    tokens_after,
    video_t,
    video_h,
    video_w,
    tiles_h,
    tiles_w,
    BLOCK: gl.constexpr,
    DIM: gl.constexpr,
    GROUP: gl.constexpr,
    TILED: gl.constexpr,
    BY_ROWS: gl.constexpr,
    STAGES: gl.constexpr,
    PRODUCER_WARPS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):
    """Programs: as many as run at once; each takes every so-manieth query tile, head by head.

    TILED: `key` and `value` are the copy in tile order; the descriptors see its rows, and else boxes of the video.
    BY_ROWS: some rows must be fetched one by one, for want of a descriptor, which takes more warps.
    """
    dtype: gl.constexpr = query.dtype.element_ty
    q_buffer = gl.allocate_shared_memory(dtype, [ROWS, DIM], SHARED)
    keys = gl.allocate_shared_memory(dtype, [STAGES, ROWS, DIM], SHARED)
    values = gl.allocate_shared_memory(dtype, [STAGES, ROWS, DIM], SHARED)
    key_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    value_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    finished = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(key_full.index(stage), count=1)
        mbarrier.init(value_full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=1)
    mbarrier.init(finished, count=1)
    pipeline = ((keys, values), (key_full, value_full, empty), finished)
    grid = (video_t, video_h, video_w, tiles_h, tiles_w)
    lists = (full_tile_starts, partial_groups, list_lengths, max_norm, max_key_norm, needs_online)
    numbers = (tasks, heads, batch_heads, num_tiles, top_k, partial_width, bits_width, scale)
    gl.warp_specialize(
        [
            (
                consumer,
                (
                    (gate, pooled_kv, coarse, selected_bits, log_size),
                    (output, output_descriptor, lse),
                    (context_key, context_value, context_mask, tokens_before, tokens_after),
                    lists,
                    ((output_b, output_s, output_h), lse_b),
                    numbers,
                    grid,
                    q_buffer,
                    pipeline,
                    BLOCK,
                    GROUP,
                    TILED,
                ),
            ),
            (
                producer,
                (
                    (key, value, key_descriptor, value_descriptor, (key_groups, value_groups), pooled_descriptor),
                    (context_key, context_value, context_mask, tokens_before, tokens_after),
                    lists,
                    (key_b, key_s, key_h, value_b, value_s, value_h),
                    (query, query_descriptor, (query_b, query_s, query_h)),
                    (gate, gate_descriptor, (gate_b, gate_s, gate_h)),
                    numbers,
                    grid,
                    pipeline,
                    (chunk_counters, sync_chunks),
                    BLOCK,
                    GROUP,
                    TILED,
                    BY_ROWS,
                ),
            ),
        ],
        [PRODUCER_WARPS],
        [PRODUCER_REGISTERS],
    )


def _rows_descriptor(rows: torch.Tensor, block: tuple[int, int] | None = None) -> TensorDescriptor:
    """Of a block of rows and columns, 64 whole rows unless told otherwise, of rows that lie one after another."""
    dim = rows.shape[-1]
    return TensorDescriptor.from_tensor(rows.view(-1, dim), list(block or (ROWS.value, dim)), SHARED.value)


def _box_descriptor(x: torch.Tensor | None, grid: TileGrid) -> TensorDescriptor | None:
    """Of a tile of one head of `[B, S, H, D]`, where there can be one."""
    if x is None or not has_boxes(form_of(x), grid):
        return None
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


def hopper_forward(
    launcher: Launcher,
    tensors: ForwardTensors,
    pooled: PooledTiles,
    selected: SelectedTiles,
    problem: Problem,
    launch: HopperLaunch,
) -> None:
    """Write `output` and `lse` of the video queries; those of context queries are left to `context_forward`."""
    grid = problem.grid
    context = (None, None, None)
    if problem.num_context:
        context = (tensors.key, tensors.value, tensors.context_mask)
        tensors = tensors.of_video(launcher, problem.video)
    query, key, value, gate, output, _, lse, _ = tensors
    assert lse is not None
    sequence_strides = strides(query, key, value, gate, output, missing=query)
    groups: list[TensorDescriptor | None] = [None, None]
    if pooled.rows is not None:
        key, value = pooled.rows.unbind(0)
        descriptors = [_rows_descriptor(rows) for rows in (key, value)]
        if selected.partial_groups is not None:
            groups = [_rows_descriptor(rows, (GROUP, PANEL_COLUMNS.value)) for rows in (key, value)]
    else:
        descriptors = [_box_descriptor(x, grid) for x in (key, value)]
    tasks = grid.num_tiles * query.shape[0] * query.shape[2]
    programs = min(tasks, launch.programs)
    turns = -(-tasks // programs)
    # Whether each task must be done again, online, and then for each program whether any of its tasks must.
    needs_online = launcher.empty(selected.full_tile_starts, (tasks + programs,))
    query_box, gate_box, output_box = (_box_descriptor(x, grid) for x in (query, gate, output))
    boxes_alone = query_box is not None and (gate is None or gate_box is not None)
    partial_by_rows = selected.partial_groups is not None and pooled.rows is None
    by_rows = not boxes_alone or problem.num_context > 0 or partial_by_rows
    launcher.launch(
        hopper_forward_kernel,
        (programs,),
        query,
        key,
        value,
        query_box,
        *descriptors,
        gate_box,
        output_box,
        *groups,
        None if pooled.pooled_kv is None else _rows_descriptor(pooled.pooled_kv),
        *list_arguments(pooled, selected),
        selected.max_key_norm,
        needs_online,
        selected.chunk_counters,
        selected.coarse,
        gate,
        output,
        lse,
        *context,
        problem.scale * math.log2(math.e),
        *sequence_strides,
        lse.stride(0),
        min(launch.sync_chunks, tasks // turns),  # as many as can be counted
        tasks,
        *size_arguments(query, selected, problem),
        problem.before,
        problem.after,
        *grid_arguments(grid),
        DIM=query.shape[3],
        GROUP=GROUP,
        TILED=pooled.rows is not None,
        BY_ROWS=by_rows,
        STAGES=launch.stages,
        PRODUCER_WARPS=launch.producer_warps[by_rows],
        PRODUCER_REGISTERS=launch.producer_registers,
        num_warps=launch.warps,
        maxnreg=launch.registers,
        enable_fp_fusion=False,  # as in the sparse kernel
    )
