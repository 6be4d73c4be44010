"""One pass over the output and its gradient, before the gradients of query, key and value.

Per row: the log-sum-exp in base 2, and delta, the product of the attention's output and its gradient, both by position.
Per tile: the gradient of the coarse output. Per token: the gradient of the gate. For long lists, query and gradient in
tile order.

Shapes: B batch, S sequence, H heads of this pass, P = B * H, N tiles, V video tokens, D head_dim; M = BLOCK_M rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...problem import Problem
from ..arguments import grid_arguments, power_of_two, strides
from ..buffers import BackwardTensors, Preprocessed
from ..primitives.geometry import SIZES, SLICED
from ..primitives.rows import load_rows, rows_of, task_of
from ..primitives.softmax import LOG2E
from ..recording import Launcher


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=SLICED)
def backward_preprocess_kernel(
    query,
    output,
    grad_output,
    gate,
    coarse,
    lse,
    lse_and_delta,
    rows,
    grad_coarse,
    coarse_delta,
    grad_gate,
    query_b,
    query_s,
    query_h,
    output_b,
    output_s,
    output_h,
    grad_b,
    grad_s,
    grad_h,
    gate_b,
    gate_s,
    gate_h,
    grad_gate_b,
    grad_gate_s,
    grad_gate_h,
    lse_b,
    heads,
    batch_heads,
    num_tiles,
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
    TILED: tl.constexpr,
    HAS_CONTEXT: tl.constexpr,
):
    """Programs: the blocks of context rows of all heads first, then query tiles, head by head."""
    grid = (video_t, video_h, video_w, tiles_h, tiles_w)
    context_tokens = tokens_before + tokens_after
    video_tokens = video_t * video_h * video_w
    length = video_tokens + context_tokens
    in_context, batch, head, batch_head, tile, context_index = task_of(
        tl.program_id(0), heads, num_tiles, batch_heads, context_tokens, BLOCK_M, HAS_CONTEXT
    )
    tokens, position, exists, _ = rows_of(
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
    dim = tl.arange(0, BLOCK_D)
    mask = exists[:, None] & (dim[None, :] < HEAD_DIM)
    grad = load_rows(grad_output + batch * grad_b + head * grad_h, tokens * grad_s, exists, dim, HEAD_DIM, BLOCK_D)
    out = load_rows(output + batch * output_b + head * output_h, tokens * output_s, exists, dim, HEAD_DIM, BLOCK_D)
    if rows is not None:
        in_video = mask
        if HAS_CONTEXT:
            in_video &= ~in_context
        q = load_rows(query + batch * query_b + head * query_h, tokens * query_s, exists, dim, HEAD_DIM, BLOCK_D)
        copy = rows + (batch_head * video_tokens + position[:, None]) * HEAD_DIM + dim[None, :]
        tl.store(copy, q, in_video)
        tl.store(copy + batch_heads.to(tl.int64) * video_tokens * HEAD_DIM, grad, in_video)
    grad = grad.to(tl.float32)  # [M, BLOCK_D]
    out = out.to(tl.float32)  # [M, BLOCK_D]
    if coarse is not None:
        width = HEAD_DIM
        if HAS_CONTEXT:
            width = tl.where(in_context, 0, HEAD_DIM)
        offset = (batch_head * num_tiles + tile) * HEAD_DIM + dim
        own = tl.load(coarse + offset, dim < width, other=0.0)
        spread = own[None, :]
        weighted = grad
        if gate is not None:
            at_grad = (
                grad_gate + batch * grad_gate_b + head * grad_gate_h + tokens[:, None] * grad_gate_s + dim[None, :]
            )
            tl.store(at_grad, (grad * spread).to(grad_gate.dtype.element_ty), mask)
            g = load_rows(gate + batch * gate_b + head * gate_h, tokens * gate_s, exists, dim, HEAD_DIM, BLOCK_D)
            g = g.to(tl.float32)
            spread = spread * g
            weighted = grad * g
        out -= spread
        total = tl.sum(weighted, 0)
        tl.store(grad_coarse + offset, total, dim < width)
        tl.store(coarse_delta + batch_head * num_tiles + tile, tl.sum(total * own, 0), width > 0)
    source = lse + batch * lse_b + head * length
    lse_and_delta += batch_head * length + position
    tl.store(lse_and_delta, tl.load(source + tokens, exists, other=0.0) * LOG2E, exists)
    tl.store(lse_and_delta + batch_heads.to(tl.int64) * length, tl.sum(grad * out, 1), exists)


def backward_preprocess(
    launcher: Launcher,
    tensors: BackwardTensors,
    coarse: torch.Tensor | None,
    problem: Problem,
    *,
    tiled: bool,
    warps: int,
) -> Preprocessed:
    """Read what the forward pass left, and write `grad_gate`. With `tiled`, positions are in tile order."""
    query, gate, lse = tensors.query, tensors.gate, tensors.lse
    batch, sequence, heads, dim = query.shape
    grid = problem.grid
    batch_heads = batch * heads
    preprocessed = Preprocessed(
        lse_and_delta=launcher.empty(lse, (2, batch_heads, sequence)),
        rows=launcher.empty(query, (2, batch_heads, grid.num_tokens, dim)) if tiled else None,
        grad_coarse=None if coarse is None else launcher.empty(coarse, coarse.shape),
        coarse_delta=None if coarse is None else launcher.empty(coarse, coarse.shape[:2]),
    )
    block_m = power_of_two(grid.tile_capacity)
    launcher.launch(
        backward_preprocess_kernel,
        ((grid.num_tiles + -(-problem.num_context // block_m)) * batch_heads,),
        query,
        tensors.output,
        tensors.grad_output,
        gate,
        coarse,
        lse,
        preprocessed.lse_and_delta,
        preprocessed.rows,
        preprocessed.grad_coarse,
        preprocessed.coarse_delta,
        tensors.grad_gate,
        *strides(query, tensors.output, tensors.grad_output),
        *strides(gate, tensors.grad_gate, missing=query),
        lse.stride(0),
        heads,
        batch_heads,
        grid.num_tiles,
        problem.before,
        problem.after,
        *grid_arguments(grid),
        HEAD_DIM=dim,
        BLOCK_D=power_of_two(dim),
        BLOCK_M=block_m,
        TILED=tiled,
        HAS_CONTEXT=problem.num_context > 0,
        num_warps=warps,
    )
    return preprocessed
