"""The gradient of the query: a program per query tile walks what the forward pass walked, and adds up in fp32.

Shapes: B batch, H heads of this pass, P = B * H, S sequence, N tiles, V video tokens, D head_dim, C context tokens.
M = BLOCK_M query rows, L = BLOCK_N keys of one step.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ...problem import Problem
from ..arguments import grid_arguments, power_of_two, strides, tiled_sources
from ..buffers import BackwardTensors, PooledTiles, Preprocessed, QueryLists
from ..plans import Launch
from ..primitives.geometry import SIZES
from ..primitives.rows import load_lse_and_delta, load_rows, rows_of, task_of
from ..primitives.tile_lists import GROUP
from ..primitives.tile_loop import context_loop, full_loop, partial_loop, pooled_loop
from ..recording import Launcher


@triton.jit
def dq_step(k, v, position, exists, bias, own, state, BOUNDED: tl.constexpr, PRECISION: tl.constexpr):
    """Add the keys of one step, as `tile_loop.py` calls it; `own` is `(q, grad, lse, delta, logit_scale)`."""
    q, grad, lse, delta, logit_scale = own
    (acc,) = state
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * logit_scale - lse[:, None]  # [M, L]
    if bias is not None:
        s += bias[None, :]
    p = tl.math.exp2(s)
    dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)  # [M, L]
    ds = p * (dp - delta[:, None])
    return (tl.dot(ds.to(k.dtype), k, acc, input_precision=PRECISION),)


@triton.jit(do_not_specialize=SIZES)
def dq_kernel(
    query,
    key,
    value,
    grad_output,
    key_rows,
    value_rows,
    key_descriptor,
    value_descriptor,
    lse_and_delta,
    full_tile_starts,
    partial_groups,
    list_lengths,
    selected_bits,
    pooled_kv,
    log_size,
    grad_mean_query,
    context_mask,
    grad_query,
    scale,
    logit_scale,
    query_b,
    query_s,
    query_h,
    key_b,
    key_s,
    key_h,
    value_b,
    value_s,
    value_h,
    grad_b,
    grad_s,
    grad_h,
    grad_query_b,
    grad_query_s,
    grad_query_h,
    heads,
    batch_heads,
    num_tiles,
    top_k,
    partial_width,
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
    PARTIAL_N: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    POSITIONS_TILED: tl.constexpr,
    HAS_CONTEXT: tl.constexpr,
):
    """Programs: the blocks of context queries of all heads first (the longest), then query tiles, head by head."""
    grid = (video_t, video_h, video_w, tiles_h, tiles_w)
    TILED: tl.constexpr = key_rows is not None
    TILE: tl.constexpr = BLOCK[0] * BLOCK[1] * BLOCK[2]
    dim = tl.arange(0, BLOCK_D)
    video_tokens = video_t * video_h * video_w
    context_tokens = tokens_before + tokens_after
    length = video_tokens + context_tokens
    in_context, batch, head, batch_head, tile, context_index = task_of(
        tl.program_id(0), heads, num_tiles, batch_heads, context_tokens, BLOCK_M, HAS_CONTEXT
    )
    tokens, position, exists, size = rows_of(
        in_context,
        tile,
        context_index,
        tokens_before,
        context_tokens,
        grid,
        BLOCK,
        BLOCK_M,
        POSITIONS_TILED,
        HAS_CONTEXT,
    )
    row = batch_head * num_tiles + tile
    q = load_rows(query + batch * query_b + head * query_h, tokens * query_s, exists, dim, HEAD_DIM, BLOCK_D)
    grad = load_rows(grad_output + batch * grad_b + head * grad_h, tokens * grad_s, exists, dim, HEAD_DIM, BLOCK_D)
    lse, delta = load_lse_and_delta(
        lse_and_delta + batch_head * length, batch_heads.to(tl.int64) * length, position, exists
    )
    key += batch * key_b + head * key_h
    value += batch * value_b + head * value_h
    if TILED:
        key_base = key_rows + batch_head * video_tokens * HEAD_DIM
        value_base = value_rows + batch_head * video_tokens * HEAD_DIM
    else:
        key_base = key + tokens_before.to(tl.int64) * key_s
        value_base = value + tokens_before.to(tl.int64) * value_s

    if partial_groups is not None:
        full_tiles = tl.load(list_lengths + row * 2)
        groups = tl.load(list_lengths + row * 2 + 1)
    else:
        full_tiles = top_k
        groups = 0
    listed_tiles = full_tiles
    if HAS_CONTEXT:
        listed_tiles = tl.where(in_context, 0, listed_tiles)
        full_tiles = tl.where(in_context, video_tokens // TILE, full_tiles)
    full_tile_starts += row * top_k
    own = (q, grad, lse, delta, logit_scale)
    source = (key_base, value_base, key_s, value_s)
    state = full_loop(
        dq_step,
        own,
        (tl.zeros((BLOCK_M, BLOCK_D), tl.float32),),
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
        STAGES,
        TILED,
        HAS_CONTEXT,
        False,
        PRECISION,
    )
    if partial_groups is not None or HAS_CONTEXT:
        listed_keys = groups * GROUP
        keys_left = listed_keys
        if HAS_CONTEXT:
            listed_keys = tl.where(in_context, 0, listed_keys)
            keys_left = tl.where(in_context, video_tokens - full_tiles * TILE, listed_keys)
        state = partial_loop(
            dq_step,
            own,
            state,
            source,
            None if partial_groups is None else partial_groups + row * partial_width,
            full_tiles * TILE,
            keys_left,
            listed_keys,
            video_h,
            video_w,
            HEAD_DIM,
            BLOCK_D,
            PARTIAL_N,
            GROUP,
            1,
            TILED,
            False,
            PRECISION,
        )
    if pooled_kv is not None:
        pooled_tiles = num_tiles
        if HAS_CONTEXT:
            pooled_tiles = tl.where(in_context, 0, num_tiles)
        state = pooled_loop(
            dq_step,
            own,
            state,
            pooled_kv,
            log_size,
            selected_bits + batch_head * tl.cdiv(num_tiles, 32) * num_tiles + tile,
            num_tiles,
            pooled_tiles,
            batch_head,
            batch_heads,
            num_tiles,
            HEAD_DIM,
            BLOCK_D,
            BLOCK_N,
            STAGES,
            False,
            PRECISION,
        )
    if HAS_CONTEXT:
        state = context_loop(
            dq_step,
            own,
            state,
            (key, value, key_s, value_s),
            None if context_mask is None else context_mask + batch * context_tokens,
            tokens_before,
            context_tokens,
            video_tokens,
            HEAD_DIM,
            BLOCK_D,
            PARTIAL_N,
            PRECISION,
        )
    (acc,) = state

    acc *= scale
    if grad_mean_query is not None:
        width = HEAD_DIM
        if HAS_CONTEXT:
            width = tl.where(in_context, 0, HEAD_DIM)
        acc += tl.load(grad_mean_query + row * HEAD_DIM + dim, dim < width, other=0.0)[None, :] / size
    to = grad_query + batch * grad_query_b + head * grad_query_h + tokens[:, None] * grad_query_s + dim[None, :]
    tl.store(to, acc.to(grad_query.dtype.element_ty), exists[:, None] & (dim[None, :] < HEAD_DIM))


def dq(
    launcher: Launcher,
    tensors: BackwardTensors,
    pooled: PooledTiles,
    preprocessed: Preprocessed,
    lists: QueryLists,
    grad_mean_query: torch.Tensor | None,
    problem: Problem,
    launch: Launch,
) -> None:
    """Write `grad_query`, given the gradient of the query means `[P, N, D]`."""
    query = tensors.query
    batch, _, heads, dim = query.shape
    grid, context = problem.grid, problem.num_context
    block_m = power_of_two(grid.tile_capacity)
    launcher.launch(
        dq_kernel,
        ((grid.num_tiles + -(-context // block_m)) * batch * heads,),
        query,
        tensors.key,
        tensors.value,
        tensors.grad_output,
        *tiled_sources(pooled.rows, launch),
        preprocessed.lse_and_delta,
        lists.full_tile_starts,
        lists.partial_groups,
        lists.list_lengths,
        lists.selected_bits,
        pooled.pooled_kv,
        pooled.log_size,
        grad_mean_query,
        tensors.context_mask,
        tensors.grad_query,
        problem.scale,
        problem.scale * math.log2(math.e),
        *strides(query, tensors.key, tensors.value, tensors.grad_output, tensors.grad_query),
        heads,
        batch * heads,
        grid.num_tiles,
        problem.top_k,
        0 if lists.partial_groups is None else lists.partial_groups.shape[2],
        problem.before,
        problem.after,
        *grid_arguments(grid),
        HEAD_DIM=dim,
        BLOCK_D=power_of_two(dim),
        BLOCK_M=block_m,
        BLOCK_N=launch.keys,
        PARTIAL_N=launch.partial_keys,
        GROUP=GROUP,
        STAGES=launch.stages,
        PRECISION="ieee",
        POSITIONS_TILED=preprocessed.rows is not None,
        HAS_CONTEXT=context > 0,
        **launch.options,
    )
