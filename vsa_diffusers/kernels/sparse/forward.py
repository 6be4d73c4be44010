"""The sparse kernel: exact attention of a query tile over the tiles it keeps, and the combine, in one launch.

A program takes one query tile of one head. It walks its full tiles without masks, then the groups of its partial tiles,
then (merge) the pooled tiles it does not keep, then the context keys, all in one online softmax. A block of context
queries is a query tile that keeps everything: it walks all rows in order.

Shapes: B batch, H heads of this pass, S sequence, N tiles, V video tokens, D head_dim, K kept tiles, C context tokens.
M = BLOCK_M query rows, K_N = BLOCK_N keys of one step.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ...problem import Problem
from ..arguments import grid_arguments, list_arguments, power_of_two, size_arguments, strides, tiled_sources
from ..buffers import ForwardTensors, PooledTiles, SelectedTiles
from ..plans import Launch
from ..primitives.geometry import SIZES, SLICED, slot_offset, tile_box
from ..primitives.softmax import HEADROOM, LN2, MAX_BOUNDED_LOGIT, MIN_ROW_SUM, softmax_step
from ..primitives.tile_lists import GROUP
from ..primitives.tile_loop import context_loop, full_loop, partial_loop, pooled_loop
from ..recording import Launcher


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=SLICED)
def sparse_forward_kernel(
    query,
    key,
    value,
    key_rows,
    value_rows,
    key_descriptor,
    value_descriptor,
    full_tile_starts,
    partial_groups,
    list_lengths,
    selected_bits,
    pooled_kv,
    log_size,
    max_norm,
    max_key_norm,
    coarse,
    gate,
    context_mask,
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
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
    STAGES: tl.constexpr,
    PARTIAL_STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_CONTEXT: tl.constexpr,
):
    """Programs: the blocks of context queries of all heads first (the longest), then query tiles, head by head."""
    grid = (video_t, video_h, video_w, tiles_h, tiles_w)
    TILED: tl.constexpr = key_rows is not None
    TILE: tl.constexpr = BLOCK[0] * BLOCK[1] * BLOCK[2]
    slot = tl.arange(0, BLOCK_M)
    dim = tl.arange(0, BLOCK_D)
    video_tokens = video_t * video_h * video_w
    context_tokens = tokens_before + tokens_after

    # Which rows of the sequence this program answers for.
    program = tl.program_id(0)
    if HAS_CONTEXT:
        blocks = tl.cdiv(context_tokens, BLOCK_M)
        in_context = program < blocks * batch_heads
        program = tl.where(in_context, program, program - blocks * batch_heads)
        batch_head = tl.where(in_context, program // tl.maximum(blocks, 1), program // num_tiles)
        tile = tl.where(in_context, 0, program % num_tiles)
        context_index = program % tl.maximum(blocks, 1) * BLOCK_M + slot
    else:
        in_context = False
        batch_head = program // num_tiles
        tile = program % num_tiles
    t, h, w, extent_t, extent_h, extent_w = tile_box(tile, grid, BLOCK)
    size = extent_t * extent_h * extent_w
    tokens = tokens_before + (t * video_h + h) * video_w + w + slot_offset(slot, extent_h, extent_w, video_h, video_w)
    row_mask = slot < size
    if HAS_CONTEXT:
        tokens = tl.where(
            in_context, tl.where(context_index < tokens_before, context_index, context_index + video_tokens), tokens
        )
        row_mask = tl.where(in_context, context_index < context_tokens, row_mask)
    tokens = tokens.to(tl.int64)
    batch = (batch_head // heads).to(tl.int64)
    head = (batch_head % heads).to(tl.int64)
    batch_head = batch_head.to(tl.int64)
    row = batch_head * num_tiles + tile
    dim_mask = row_mask[:, None] & (dim[None, :] < HEAD_DIM)

    at_query = query + batch * query_b + head * query_h + tokens[:, None] * query_s + dim[None, :]
    q = tl.load(at_query, dim_mask, other=0.0)  # [M, BLOCK_D]
    if gate is not None:  # asked for before the loops, so that the end of the program need not wait for it
        at_gate = gate + batch * gate_b + head * gate_h + tokens[:, None] * gate_s + dim[None, :]
        g = tl.load(at_gate, dim_mask, other=0.0)  # [M, BLOCK_D]
    key += batch * key_b + head * key_h
    value += batch * value_b + head * value_h
    if TILED:
        key_base = key_rows + batch_head * video_tokens * HEAD_DIM
        value_base = value_rows + batch_head * video_tokens * HEAD_DIM
    else:
        key_base = key + tokens_before.to(tl.int64) * key_s
        value_base = value + tokens_before.to(tl.int64) * value_s
    source = (key_base, value_base, key_s, value_s)

    # How long each part of the walk is.
    full_tiles = top_k
    groups = 0
    if partial_groups is not None:
        full_tiles = tl.load(list_lengths + row * 2)
        groups = tl.load(list_lengths + row * 2 + 1)
        partial_groups += row * partial_width
    if selected_bits is not None:
        selected_bits += row * bits_width
    full_tile_starts += row * top_k
    listed_tiles = full_tiles
    listed_keys = groups * GROUP
    keys_left = listed_keys
    pooled_tiles = num_tiles
    if HAS_CONTEXT:
        full_tiles = tl.where(in_context, video_tokens // TILE, full_tiles)
        listed_keys = tl.where(in_context, 0, listed_keys)
        listed_tiles = tl.where(in_context, 0, listed_tiles)
        keys_left = tl.where(in_context, video_tokens % TILE, listed_keys)
        pooled_tiles = tl.where(in_context, 0, num_tiles)

    # Bounded, if norms allow it; and online where they do not, or where weights have underflowed.
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    to_do = True
    bound = 0.0
    if max_key_norm is not None:
        # No logit is further from zero than the norms of the longest row and the longest key allow.
        if HAS_CONTEXT:
            norms = tl.sqrt(tl.sum(q.to(tl.float32) * q.to(tl.float32), 1))
            norm = tl.max(tl.where(row_mask, norms, 0.0), 0)
        else:
            norm = tl.load(max_norm + row)
        bound = norm * tl.load(max_key_norm + batch_head) * tl.abs(scale)
        to_do = bound < MAX_BOUNDED_LOGIT
    for attempt in tl.static_range(0 if max_key_norm is not None else 1, 2):
        if to_do:
            if attempt == 0:
                row_max = tl.full((BLOCK_M,), 0.0, tl.float32) + tl.maximum(bound - HEADROOM, 0.0)
            else:
                row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
            LOOP_STAGES: tl.constexpr = STAGES if attempt == 0 or max_key_norm is None or HAS_CONTEXT else 1
            state = full_loop(
                softmax_step,
                (q, scale),
                (row_max, tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M, BLOCK_D), tl.float32)),
                source,
                (key_descriptor, value_descriptor),
                full_tile_starts,
                full_tiles,
                listed_tiles,
                in_context,
                batch_head,
                video_h,
                video_w,
                BLOCK,
                HEAD_DIM,
                BLOCK_D,
                BLOCK_N,
                LOOP_STAGES,
                TILED,
                HAS_CONTEXT,
                attempt == 0,
                PRECISION,
            )
            if partial_groups is not None or HAS_CONTEXT:
                state = partial_loop(
                    softmax_step,
                    (q, scale),
                    state,
                    source,
                    partial_groups,
                    full_tiles * TILE,
                    keys_left,
                    listed_keys,
                    video_h,
                    video_w,
                    HEAD_DIM,
                    BLOCK_D,
                    BLOCK_N,
                    GROUP,
                    PARTIAL_STAGES if attempt == 0 else 1,
                    TILED,
                    attempt == 0,
                    PRECISION,
                )
            if pooled_kv is not None:  # more stages than two would take the room of a second program
                state = pooled_loop(
                    softmax_step,
                    (q, scale),
                    state,
                    pooled_kv,
                    log_size,
                    selected_bits,
                    1,
                    pooled_tiles,
                    batch_head,
                    batch_heads,
                    num_tiles,
                    HEAD_DIM,
                    BLOCK_D,
                    BLOCK_N,
                    min(LOOP_STAGES, 2),
                    attempt == 0,
                    PRECISION,
                )
            row_max, row_sum, acc = state
            if attempt == 0:
                to_do = tl.min(tl.where(row_mask, row_sum, 1.0), 0) <= MIN_ROW_SUM
        elif attempt == 0:
            to_do = True

    if HAS_CONTEXT:
        row_max, row_sum, acc = context_loop(
            softmax_step,
            (q, scale),
            (row_max, row_sum, acc),
            (key, value, key_s, value_s),
            None if context_mask is None else context_mask + batch * context_tokens,
            tokens_before,
            context_tokens,
            video_tokens,
            HEAD_DIM,
            BLOCK_D,
            BLOCK_N,
            PRECISION,
        )

    acc = acc / row_sum[:, None]
    if coarse is not None:
        width = HEAD_DIM
        if HAS_CONTEXT:
            width = tl.where(in_context, 0, HEAD_DIM)
        spread = tl.load(coarse + row * HEAD_DIM + dim, dim < width, other=0.0)[None, :]
        if gate is not None:
            spread = spread * g.to(tl.float32)  # [M, BLOCK_D]
        acc += spread
    at_output = output + batch * output_b + head * output_h + tokens[:, None] * output_s + dim[None, :]
    tl.store(at_output, acc.to(output.dtype.element_ty), dim_mask)
    length = video_tokens + context_tokens
    tl.store(lse + batch * lse_b + head * length + tokens, (row_max + tl.math.log2(row_sum)) * LN2, row_mask)


def sparse_forward(
    launcher: Launcher,
    tensors: ForwardTensors,
    pooled: PooledTiles,
    selected: SelectedTiles,
    problem: Problem,
    launch: Launch,
) -> None:
    """Write `output` and `lse` of all queries, for the heads of `tensors`."""
    batch, _, heads, _ = tensors.query.shape
    max_key_norm = selected.max_key_norm if tensors.query.dtype == torch.bfloat16 else None
    lists = (*list_arguments(pooled, selected), max_key_norm, selected.coarse)
    sizes = size_arguments(tensors.query, selected, problem)
    _launch(launcher, problem.grid.num_tiles * batch * heads, tensors, pooled.rows, lists, sizes, problem, launch)


def context_forward(launcher: Launcher, tensors: ForwardTensors, problem: Problem, launch: Launch) -> None:
    """Write `output` and `lse` of the context queries alone, dense, which the Hopper kernel leaves out."""
    batch, _, heads, _ = tensors.query.shape
    lists = (tensors.indices, *[None] * 8)  # nothing is read from the list, but Triton wants a pointer
    sizes = (heads, batch * heads, problem.grid.num_tiles, problem.top_k, 0, 0)
    _launch(launcher, 0, tensors._replace(gate=None), None, lists, sizes, problem, launch)


def _launch(
    launcher: Launcher,
    query_tiles: int,
    tensors: ForwardTensors,
    rows: torch.Tensor | None,
    lists: tuple[torch.Tensor | None, ...],
    sizes: tuple[int, ...],
    problem: Problem,
    launch: Launch,
) -> None:
    """One launch of the kernel, for so many query tiles and for all context queries.

    `lists` are its arguments from `full_tile_starts` to `coarse`.
    """
    query, lse = tensors.query, tensors.lse
    assert lse is not None
    batch, _, heads, dim = query.shape
    block_m = power_of_two(problem.grid.tile_capacity)
    launcher.launch(
        sparse_forward_kernel,
        (query_tiles + -(-problem.num_context // block_m) * batch * heads,),
        query,
        tensors.key,
        tensors.value,
        *tiled_sources(rows, launch),
        *lists,
        tensors.gate,
        tensors.context_mask,
        tensors.output,
        lse,
        problem.scale * math.log2(math.e),
        *strides(query, tensors.key, tensors.value, tensors.gate, tensors.output, missing=query),
        lse.stride(0),
        *sizes,
        problem.before,
        problem.after,
        *grid_arguments(problem.grid),
        HEAD_DIM=dim,
        BLOCK_D=power_of_two(dim),
        BLOCK_M=block_m,
        BLOCK_N=launch.keys,
        GROUP=GROUP,
        STAGES=launch.stages,
        PARTIAL_STAGES=launch.partial_stages,
        PRECISION="ieee",
        HAS_CONTEXT=problem.num_context > 0,
        **launch.options,
        enable_fp_fusion=False,  # fused, a huge logit would miss itself as the maximum by more than exp2 can hold
    )
