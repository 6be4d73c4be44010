"""The gradients of key and value: a program per key tile walks the query tiles that keep it, and adds up in fp32.

A block of context keys is a key tile that every query keeps. In merge, the gradients of the pooled keys and values come
from `backward_pooled.py`, in splits, and are spread over the tiles here.

Shapes: B batch, H heads of this pass, P = B * H, S sequence, N tiles, V video tokens, D head_dim, C context tokens.
M = BLOCK_M key rows, L = BLOCK_N queries of one step.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ...problem import Problem
from ..arguments import grid_arguments, power_of_two, strides, tiled_sources
from ..buffers import BackwardTensors, KeyLists, Preprocessed
from ..plans import Launch
from ..primitives.geometry import SIZES
from ..primitives.rows import load_lse_and_delta, load_rows, rows_of, task_of
from ..primitives.tile_lists import GROUP
from ..primitives.tile_loop import context_loop, full_loop, partial_loop
from ..recording import Launcher


@triton.jit
def dkdv_step(k, v, q, grad, lse, delta, dk, dv, logit_scale, bias, PRECISION: tl.constexpr):
    """Add the queries of one step; `bias` is added to the logits (base 2) of each key, `None` for full keys.

    What both gradients need comes first: one stretch of softmax between the products holds fewer registers than two.
    """
    s = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [M, L]
    dp = tl.dot(v, tl.trans(grad), input_precision=PRECISION)  # [M, L]
    s = s * logit_scale - lse[None, :]
    if bias is not None:
        s += bias[:, None]
    p = tl.math.exp2(s)
    ds = p * (dp - delta[None, :])
    dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision=PRECISION)
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def query_step(q, grad, position, exists, bias, own, state, BOUNDED: tl.constexpr, PRECISION: tl.constexpr):
    """Add the queries at these positions, as `tile_loop.py` calls it.

    `own` is `(k, v, lse_and_delta, plane, logit_scale)`: rows that do not exist have no weight by their statistics.
    """
    k, v, lse_and_delta, plane, logit_scale = own
    dk, dv = state
    if exists is not None:
        lse, delta = load_lse_and_delta(lse_and_delta, plane, position, exists)
    else:
        pointers = lse_and_delta + position
        lse = tl.load(pointers)
        delta = tl.load(pointers + plane)
    return dkdv_step(k, v, q, grad, lse, delta, dk, dv, logit_scale, None, PRECISION)


@triton.jit(do_not_specialize=SIZES)
def dkdv_kernel(
    query,
    key,
    value,
    grad_output,
    query_rows,
    grad_rows,
    query_descriptor,
    grad_descriptor,
    lse_and_delta,
    full_tile_starts,
    partial_groups,
    list_lengths,
    offsets,
    order,
    grad_mean_kv,
    context_mask,
    grad_key,
    grad_value,
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
    grad_key_b,
    grad_key_s,
    grad_key_h,
    heads,
    batch_heads,
    num_tiles,
    full_length,
    partial_length,
    splits,
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
    HAS_CONTEXT: tl.constexpr,
):
    """Programs: the blocks of context keys of all heads first (the longest), then key tiles, each head's longest first.

    Gradients of key and value share their strides.
    """
    grid = (video_t, video_h, video_w, tiles_h, tiles_w)
    TILED: tl.constexpr = query_rows is not None
    TILE: tl.constexpr = BLOCK[0] * BLOCK[1] * BLOCK[2]
    dim = tl.arange(0, BLOCK_D)
    video_tokens = video_t * video_h * video_w
    context_tokens = tokens_before + tokens_after
    length = video_tokens + context_tokens
    in_context, batch, head, batch_head, rank, context_index = task_of(
        tl.program_id(0), heads, num_tiles, batch_heads, context_tokens, BLOCK_M, HAS_CONTEXT
    )
    tile = tl.load(order + batch_head * num_tiles + rank)
    tokens, _, exists, size = rows_of(
        in_context,
        tile,
        context_index,
        tokens_before,
        context_tokens,
        grid,
        BLOCK,
        BLOCK_M,
        TILED,
        HAS_CONTEXT,
    )
    lengths_offset = (batch_head * num_tiles + tile) * 2
    k = load_rows(key + batch * key_b + head * key_h, tokens * key_s, exists, dim, HEAD_DIM, BLOCK_D)
    v = load_rows(value + batch * value_b + head * value_h, tokens * value_s, exists, dim, HEAD_DIM, BLOCK_D)
    query += batch * query_b + head * query_h
    grad_output += batch * grad_b + head * grad_h
    lse_and_delta += batch_head * length
    plane = batch_heads.to(tl.int64) * length
    if TILED:
        query_base = query_rows + batch_head * video_tokens * HEAD_DIM
        grad_base = grad_rows + batch_head * video_tokens * HEAD_DIM
    else:
        query_base = query + tokens_before.to(tl.int64) * query_s
        grad_base = grad_output + tokens_before.to(tl.int64) * grad_s
    dk = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)

    listed_tiles = tl.load(list_lengths + lengths_offset)
    full_tiles = listed_tiles
    if HAS_CONTEXT:
        listed_tiles = tl.where(in_context, 0, listed_tiles)
        full_tiles = tl.where(in_context, video_tokens // TILE, full_tiles)
    full_tile_starts += batch_head * full_length + tl.load(offsets + lengths_offset)
    own = (k, v, lse_and_delta, plane, logit_scale)
    source = (query_base, grad_base, query_s, grad_s)
    state = full_loop(
        query_step,
        own,
        (dk, dv),
        source,
        (query_descriptor, grad_descriptor),
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
        listed_rows = 0
        if partial_groups is not None:
            listed_rows = tl.load(list_lengths + lengths_offset + 1) * GROUP
            partial_groups += batch_head * partial_length + tl.load(offsets + lengths_offset + 1)
        rows_left = listed_rows
        if HAS_CONTEXT:
            listed_rows = tl.where(in_context, 0, listed_rows)
            rows_left = tl.where(in_context, video_tokens - full_tiles * TILE, listed_rows)
        state = partial_loop(
            query_step,
            own,
            state,
            source,
            partial_groups,
            full_tiles * TILE,
            rows_left,
            listed_rows,
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
    if HAS_CONTEXT:
        state = context_loop(
            query_step,
            own,
            state,
            (query, grad_output, query_s, grad_s),
            None,
            tokens_before,
            context_tokens,
            video_tokens,
            HEAD_DIM,
            BLOCK_D,
            PARTIAL_N,
            PRECISION,
        )
    dk, dv = state

    dk *= scale
    if grad_mean_kv is not None:
        width = HEAD_DIM
        if HAS_CONTEXT:
            width = tl.where(in_context, 0, HEAD_DIM)
        means = batch_heads.to(tl.int64) * num_tiles * HEAD_DIM
        grad_mean_kv += (batch_head * num_tiles + tile) * HEAD_DIM
        mean_key = tl.zeros((BLOCK_D,), tl.float32)
        mean_value = tl.zeros((BLOCK_D,), tl.float32)
        for split in range(splits):
            mean_key += tl.load(grad_mean_kv + split * 2 * means + dim, dim < width, other=0.0)
            mean_value += tl.load(grad_mean_kv + (split * 2 + 1) * means + dim, dim < width, other=0.0)
        dk += mean_key[None, :] / size
        dv += mean_value[None, :] / size
    if context_mask is not None:
        valid = tl.load(context_mask + batch * context_tokens + context_index, in_context & exists, other=1) != 0
        dk = tl.where(valid[:, None], dk, 0.0)
        dv = tl.where(valid[:, None], dv, 0.0)
    to = batch * grad_key_b + head * grad_key_h + tokens[:, None] * grad_key_s + dim[None, :]
    mask = exists[:, None] & (dim[None, :] < HEAD_DIM)
    tl.store(grad_key + to, dk.to(grad_key.dtype.element_ty), mask)
    tl.store(grad_value + to, dv.to(grad_value.dtype.element_ty), mask)


def dkdv(
    launcher: Launcher,
    tensors: BackwardTensors,
    preprocessed: Preprocessed,
    lists: KeyLists,
    grad_mean_kv: torch.Tensor | None,
    problem: Problem,
    launch: Launch,
) -> None:
    """Write `grad_key` and `grad_value`, given the gradients of the means `[splits, 2, P, N, D]`."""
    query = tensors.query
    batch, _, heads, dim = query.shape
    grid, context = problem.grid, problem.num_context
    block_m = power_of_two(grid.tile_capacity)
    launcher.launch(
        dkdv_kernel,
        ((grid.num_tiles + -(-context // block_m)) * batch * heads,),
        query,
        tensors.key,
        tensors.value,
        tensors.grad_output,
        *tiled_sources(preprocessed.rows, launch),
        preprocessed.lse_and_delta,
        lists.full_tile_starts,
        lists.partial_groups,
        lists.list_lengths,
        lists.offsets,
        lists.order,
        grad_mean_kv,
        tensors.context_mask,
        tensors.grad_key,
        tensors.grad_value,
        problem.scale,
        problem.scale * math.log2(math.e),
        *strides(query, tensors.key, tensors.value, tensors.grad_output, tensors.grad_key),
        heads,
        batch * heads,
        grid.num_tiles,
        lists.full_tile_starts.shape[1],
        0 if lists.partial_groups is None else lists.partial_groups.shape[1],
        0 if grad_mean_kv is None else len(grad_mean_kv),
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
        HAS_CONTEXT=context > 0,
        **launch.options,
    )
