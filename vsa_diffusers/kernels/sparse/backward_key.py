"""The gradients of key and value: a program per key tile walks the query tiles that keep it, and adds up in fp32.

A block of context keys is a key tile that every query keeps. In merge, the gradients of the pooled keys and values come
from a launch of their own, cut into parts where there are few tiles, and are spread over the tiles in the last one.

Shapes: B batch, H heads of this pass, P = B * H, S sequence, N tiles, V video tokens, D head_dim, C context tokens.
M = BLOCK_M key rows, L = BLOCK_N queries of one step.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ...problem import Problem
from ..arguments import grid_arguments, power_of_two, tiled_sources
from ..buffers import Keepers, Prepared
from ..plans import TAIL, Launch
from ..primitives.rows import (
    BACKWARD_SIZES,
    block_offset,
    list_start,
    load_rows,
    load_stats,
    rows_of,
    tail_rows,
    task_of,
)
from ..primitives.tile_lists import GROUP
from ..recording import Work


@triton.jit
def key_step(k, v, q, grad, lse, delta, dk, dv, logit_scale, bias, PRECISION: tl.constexpr):
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


@triton.jit(do_not_specialize=BACKWARD_SIZES)
def key_gradient_kernel(
    query,
    key,
    value,
    grad_output,
    query_rows,
    grad_rows,
    query_descriptor,
    grad_descriptor,
    stats,
    starts,
    tail,
    counts,
    offsets,
    order,
    mean_gradients,
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
    tail_length,
    parts,
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
    TAIL_N: tl.constexpr,
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
    STEPS: tl.constexpr = (TILE + BLOCK_N - 1) // BLOCK_N
    RAGGED: tl.constexpr = TILE % BLOCK_N != 0
    column = tl.arange(0, BLOCK_N)
    dim = tl.arange(0, BLOCK_D)
    video_tokens = video_t * video_h * video_w
    context_tokens = tokens_before + tokens_after
    length = video_tokens + context_tokens
    in_context, item, head, place, rank, at = task_of(
        tl.program_id(0), heads, num_tiles, batch_heads, context_tokens, BLOCK_M, HAS_CONTEXT
    )
    tile = tl.load(order + place * num_tiles + rank)
    tokens, _, exists, size = rows_of(
        in_context,
        tile,
        at,
        tokens_before,
        context_tokens,
        grid,
        BLOCK,
        BLOCK_M,
        TILED,
        HAS_CONTEXT,
    )
    entry = (place * num_tiles + tile) * 2
    k = load_rows(key + item * key_b + head * key_h, tokens * key_s, exists, dim, HEAD_DIM, BLOCK_D)
    v = load_rows(value + item * value_b + head * value_h, tokens * value_s, exists, dim, HEAD_DIM, BLOCK_D)
    query += item * query_b + head * query_h
    grad_output += item * grad_b + head * grad_h
    stats += place * length
    plane = batch_heads.to(tl.int64) * length
    if TILED:
        query_base = query_rows + place * video_tokens * HEAD_DIM
        grad_base = grad_rows + place * video_tokens * HEAD_DIM
    else:
        query_base = query + tokens_before.to(tl.int64) * query_s
        grad_base = grad_output + tokens_before.to(tl.int64) * grad_s
    dk = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)

    # Full query tiles, without masks.
    listed_tiles = tl.load(counts + entry)
    full_tiles = listed_tiles
    if HAS_CONTEXT:
        listed_tiles = tl.where(in_context, 0, listed_tiles)
        full_tiles = tl.where(in_context, video_tokens // TILE, full_tiles)
    starts += place * full_length + tl.load(offsets + entry)
    next_start = list_start(starts, 0, listed_tiles, in_context, TILE, HAS_CONTEXT)
    for step in tl.range(0, full_tiles * STEPS, num_stages=STAGES):
        inside = step % STEPS * BLOCK_N + column
        start = next_start
        next_start = list_start(starts, (step + 1) // STEPS, listed_tiles, in_context, TILE, HAS_CONTEXT)
        present = inside < TILE if RAGGED else None
        offset = inside
        if query_descriptor is not None:
            first = start + step % STEPS * BLOCK_N
            q = query_descriptor.load([place.to(tl.int32), first, 0]).reshape(BLOCK_N, BLOCK_D)  # [L, BLOCK_D]
            grad = grad_descriptor.load([place.to(tl.int32), first, 0]).reshape(BLOCK_N, BLOCK_D)  # [L, BLOCK_D]
        elif TILED:
            first = start.to(tl.int64) * HEAD_DIM
            q = load_rows(query_base + first, inside * HEAD_DIM, present, dim, HEAD_DIM, BLOCK_D)  # [L, BLOCK_D]
            grad = load_rows(grad_base + first, inside * HEAD_DIM, present, dim, HEAD_DIM, BLOCK_D)  # [L, BLOCK_D]
        else:
            offset = block_offset(inside, video_h, video_w, BLOCK)
            if HAS_CONTEXT:
                offset = tl.where(in_context, inside, offset)
            first = start.to(tl.int64)
            q = load_rows(query_base + first * query_s, offset * query_s, present, dim, HEAD_DIM, BLOCK_D)
            grad = load_rows(grad_base + first * grad_s, offset * grad_s, present, dim, HEAD_DIM, BLOCK_D)
        if RAGGED:
            lse, delta = load_stats(stats + start, plane, offset, present)
        else:
            lse = tl.load(stats + start + offset)
            delta = tl.load(stats + plane + start + offset)
        dk, dv = key_step(k, v, q, grad, lse, delta, dk, dv, logit_scale, None, PRECISION)

    # Partial query tiles, in groups of 16 queries; for context keys, the rows that the loop above left over.
    if tail is not None or HAS_CONTEXT:
        walked = full_tiles * TILE
        listed_rows = 0
        if tail is not None:
            listed_rows = tl.load(counts + entry + 1) * GROUP
            tail += place * tail_length + tl.load(offsets + entry + 1)
        rows_left = listed_rows
        if HAS_CONTEXT:
            listed_rows = tl.where(in_context, 0, listed_rows)
            rows_left = tl.where(in_context, video_tokens - walked, listed_rows)
        for first in tl.range(0, rows_left, TAIL_N, num_stages=1):
            inside = first + tl.arange(0, TAIL_N)
            present = inside < rows_left
            offset = walked + inside
            if tail is not None:
                from_list = inside < listed_rows
                listed, there = tail_rows(tail, inside, from_list, video_h, video_w, TILED, GROUP)
                present &= there | ~from_list
                offset = tl.where(from_list, listed, offset)
            offset = offset.to(tl.int64)
            q = load_rows(query_base, offset * (HEAD_DIM if TILED else query_s), present, dim, HEAD_DIM, BLOCK_D)
            grad = load_rows(grad_base, offset * (HEAD_DIM if TILED else grad_s), present, dim, HEAD_DIM, BLOCK_D)
            lse, delta = load_stats(stats, plane, offset, present)
            dk, dv = key_step(k, v, q, grad, lse, delta, dk, dv, logit_scale, None, PRECISION)

    # Context queries.
    if HAS_CONTEXT:
        for first in tl.range(0, context_tokens, TAIL_N, num_stages=1):
            index = first + tl.arange(0, TAIL_N)
            present = index < context_tokens
            offset = tl.where(index < tokens_before, index, index + video_tokens).to(tl.int64)
            q = load_rows(query, offset * query_s, present, dim, HEAD_DIM, BLOCK_D)
            grad = load_rows(grad_output, offset * grad_s, present, dim, HEAD_DIM, BLOCK_D)
            lse, delta = load_stats(stats, plane, video_tokens + index, present)
            dk, dv = key_step(k, v, q, grad, lse, delta, dk, dv, logit_scale, None, PRECISION)

    dk *= scale
    if mean_gradients is not None:
        width = HEAD_DIM
        if HAS_CONTEXT:
            width = tl.where(in_context, 0, HEAD_DIM)
        means = batch_heads.to(tl.int64) * num_tiles * HEAD_DIM
        mean_gradients += (place * num_tiles + tile) * HEAD_DIM
        mean_key = tl.zeros((BLOCK_D,), tl.float32)
        mean_value = tl.zeros((BLOCK_D,), tl.float32)
        for part in range(parts):
            mean_key += tl.load(mean_gradients + part * 2 * means + dim, dim < width, other=0.0)
            mean_value += tl.load(mean_gradients + (part * 2 + 1) * means + dim, dim < width, other=0.0)
        dk += mean_key[None, :] / size
        dv += mean_value[None, :] / size
    if context_mask is not None:
        valid = tl.load(context_mask + item * context_tokens + at, in_context & exists, other=1) != 0
        dk = tl.where(valid[:, None], dk, 0.0)
        dv = tl.where(valid[:, None], dv, 0.0)
    to = item * grad_key_b + head * grad_key_h + tokens[:, None] * grad_key_s + dim[None, :]
    mask = exists[:, None] & (dim[None, :] < HEAD_DIM)
    tl.store(grad_key + to, dk.to(grad_key.dtype.element_ty), mask)
    tl.store(grad_value + to, dv.to(grad_value.dtype.element_ty), mask)


def key_gradient(
    work: Work,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    grad_output: torch.Tensor,
    context_mask: torch.Tensor | None,
    prepared: Prepared,
    keepers: Keepers,
    mean_gradients: torch.Tensor | None,
    grad_key: torch.Tensor,
    grad_value: torch.Tensor,
    problem: Problem,
    launch: Launch,
) -> None:
    """Write `grad_key` and `grad_value` `[B, S, H, D]`, given the gradients of the means `[parts, 2, P, N, D]`."""
    batch, _, heads, dim = query.shape
    grid, context = problem.grid, problem.num_context
    block_m = power_of_two(grid.tile_capacity)
    block_n = max(16, min(launch.keys, block_m))
    work.launch(
        key_gradient_kernel,
        ((grid.num_tiles + -(-context // block_m)) * batch * heads,),
        query,
        key,
        value,
        grad_output,
        *tiled_sources(prepared.rows, launch, block_n),
        prepared.stats,
        keepers.starts,
        keepers.tail,
        keepers.counts,
        keepers.offsets,
        keepers.order,
        mean_gradients,
        context_mask,
        grad_key,
        grad_value,
        problem.scale,
        problem.scale * math.log2(math.e),
        *query.stride()[:3],
        *key.stride()[:3],
        *value.stride()[:3],
        *grad_output.stride()[:3],
        *grad_key.stride()[:3],
        heads,
        batch * heads,
        grid.num_tiles,
        keepers.starts.shape[1],
        0 if keepers.tail is None else keepers.tail.shape[1],
        0 if mean_gradients is None else len(mean_gradients),
        problem.before,
        problem.after,
        *grid_arguments(grid),
        HEAD_DIM=dim,
        BLOCK_D=power_of_two(dim),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        TAIL_N=min(block_n, TAIL),
        GROUP=GROUP,
        STAGES=launch.stages,
        PRECISION="ieee",
        HAS_CONTEXT=context > 0,
        **launch.options,
    )
