"""Attention between tile means, and its gradient: fp32, no matrix of all scores is stored.

Shapes: P heads of all batch items, N tiles, D head_dim; M = BLOCK_M tiles of a program, L = BLOCK_N of one step.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ..arguments import power_of_two
from ..buffers import Preprocessed
from ..plans import BlockLaunch
from ..primitives.geometry import SIZES, workspace_width
from ..primitives.softmax import LOG2E
from ..recording import Launcher


@triton.jit
def _means(base, tile, num_tiles, dim, HEAD_DIM: tl.constexpr):
    """Rows of tiles, fp32 `[tiles, BLOCK_D]`, 0 beyond the last one."""
    mask = (tile[:, None] < num_tiles) & (dim[None, :] < HEAD_DIM)
    return tl.load(base + tile[:, None] * HEAD_DIM + dim[None, :], mask, other=0.0)


@triton.jit(do_not_specialize=SIZES)
def coarse_kernel(
    means,
    scores,
    coarse,
    lse,
    first_row,
    batch_heads,
    num_tiles,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (M query tiles of one head, from row `first_row` of all on): what is asked for of these.

    Args:
        scores: `[rows, width]`, the workspace of `top_k.py`.
        coarse: their coarse output.
        lse: its log-sum-exp (base 2).
    """
    blocks = tl.cdiv(num_tiles, BLOCK_M)
    task = first_row // BLOCK_M + tl.program_id(0)
    batch_head = (task // blocks).to(tl.int64)
    row = task % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    dim = tl.arange(0, BLOCK_D)
    plane = batch_heads.to(tl.int64) * num_tiles * HEAD_DIM
    start = batch_head * num_tiles * HEAD_DIM
    own = start + row[:, None] * HEAD_DIM + dim[None, :]
    own_mask = (row[:, None] < num_tiles) & (dim[None, :] < HEAD_DIM)
    means += start
    q = _means(means, row, num_tiles, dim, HEAD_DIM)  # [M, D]
    workspace_row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for first in range(0, num_tiles, BLOCK_N):
        column = first + tl.arange(0, BLOCK_N)
        offset = column[:, None] * HEAD_DIM + dim[None, :]
        mask = (column[:, None] < num_tiles) & (dim[None, :] < HEAD_DIM)
        k = tl.load(means + plane + offset, mask, other=0.0)  # [L, D]
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale  # [M, L]
        if scores is not None:
            to = workspace_row[:, None] * workspace_width(num_tiles) + column[None, :]
            tl.store(scores + to, s, column[None, :] < num_tiles)
        if coarse is not None:
            s = tl.where(column[None, :] < num_tiles, s, float("-inf"))
            v = tl.load(means + 2 * plane + offset, mask, other=0.0)  # [L, D]
            new_max = tl.maximum(row_max, tl.max(s, 1))
            p = tl.exp(s - new_max[:, None])
            rescale = tl.exp(row_max - new_max)
            row_sum = row_sum * rescale + tl.sum(p, 1)
            acc = tl.dot(p, v, acc * rescale[:, None], input_precision=PRECISION)
            row_max = new_max
    if coarse is not None:
        tl.store(coarse + own, acc / row_sum[:, None], own_mask)
    if lse is not None:
        tl.store(lse + batch_head * num_tiles + row, (row_max + tl.log(row_sum)) * LOG2E, row < num_tiles)


@triton.jit(do_not_specialize=SIZES)
def coarse_gradient_kernel(
    means,
    lse,
    grad_coarse,
    coarse_delta,
    grad_mean_query,
    grad_mean_kv,
    batch_heads,
    num_tiles,
    scale,
    logit_scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (M tiles of one head; 0: gradient of their query means, 1: of their key and value means)."""
    blocks = tl.cdiv(num_tiles, BLOCK_M)
    batch_head = (tl.program_id(0) // blocks).to(tl.int64)
    row = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    dim = tl.arange(0, BLOCK_D)
    plane = batch_heads.to(tl.int64) * num_tiles * HEAD_DIM
    start = batch_head * num_tiles * HEAD_DIM
    mean_query = means + start
    mean_key = mean_query + plane
    mean_value = mean_key + plane
    grad_coarse += start
    lse += batch_head * num_tiles
    coarse_delta += batch_head * num_tiles
    own = start + row[:, None] * HEAD_DIM + dim[None, :]
    mask = (row[:, None] < num_tiles) & (dim[None, :] < HEAD_DIM)
    first_acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if tl.program_id(1) == 0:
        q = _means(mean_query, row, num_tiles, dim, HEAD_DIM)  # [M, D]
        grad = _means(grad_coarse, row, num_tiles, dim, HEAD_DIM)  # [M, D]
        delta = tl.load(coarse_delta + row, row < num_tiles, other=0.0)
        own_lse = tl.load(lse + row, row < num_tiles, other=float("inf"))
        for first in range(0, num_tiles, BLOCK_N):
            column = first + tl.arange(0, BLOCK_N)
            k = _means(mean_key, column, num_tiles, dim, HEAD_DIM)  # [L, D]
            v = _means(mean_value, column, num_tiles, dim, HEAD_DIM)  # [L, D]
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * logit_scale
            p = tl.math.exp2(tl.where(column[None, :] < num_tiles, s - own_lse[:, None], float("-inf")))
            ds = p * (tl.dot(grad, tl.trans(v), input_precision=PRECISION) - delta[:, None])
            first_acc = tl.dot(ds, k, first_acc, input_precision=PRECISION)
        tl.store(grad_mean_query + own, first_acc * scale, mask)
    else:
        k = _means(mean_key, row, num_tiles, dim, HEAD_DIM)  # [M, D]
        v = _means(mean_value, row, num_tiles, dim, HEAD_DIM)  # [M, D]
        second_acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        for first in range(0, num_tiles, BLOCK_N):
            column = first + tl.arange(0, BLOCK_N)
            q = _means(mean_query, column, num_tiles, dim, HEAD_DIM)  # [L, D]
            grad = _means(grad_coarse, column, num_tiles, dim, HEAD_DIM)  # [L, D]
            delta = tl.load(coarse_delta + column, column < num_tiles, other=0.0)
            its_lse = tl.load(lse + column, column < num_tiles, other=float("inf"))
            s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * logit_scale
            p = tl.math.exp2(s - its_lse[None, :])  # [M, L]
            second_acc = tl.dot(p, grad, second_acc, input_precision=PRECISION)
            ds = p * (tl.dot(v, tl.trans(grad), input_precision=PRECISION) - delta[None, :])
            first_acc = tl.dot(ds, q, first_acc, input_precision=PRECISION)
        tl.store(grad_mean_kv + own, first_acc * scale, mask)
        tl.store(grad_mean_kv + plane + own, second_acc, mask)


def coarse_attention(
    launcher: Launcher,
    means: torch.Tensor,
    scores: torch.Tensor | None,
    coarse: torch.Tensor | None,
    lse: torch.Tensor | None,
    scale: float,
    launch: BlockLaunch,
    precision: str,
    rows: slice | None = None,
) -> None:
    """Write the scores, coarse output and log-sum-exp (base 2) of query tiles, those that are given.

    Args:
        means: fp32 `[3, B, H, N, D]`.
        scores: `[rows, width]`, for the rows alone.
        coarse: fp32 `[P, N, D]`.
        lse: fp32 `[P, N]`.
        precision: of the products.
        rows: some of all rows, which are counted with each head's last block of `launch.block_m` rows full.
    """
    _, batch, heads, num_tiles, dim = means.shape
    blocks = -(-num_tiles // launch.block_m) * batch * heads
    first_row, last_row = (0, blocks * launch.block_m) if rows is None else (rows.start, rows.stop)
    launcher.launch(
        coarse_kernel,
        ((last_row - first_row) // launch.block_m,),
        means,
        scores,
        coarse,
        lse,
        first_row,
        batch * heads,
        num_tiles,
        scale,
        HEAD_DIM=dim,
        BLOCK_D=power_of_two(dim),
        BLOCK_M=launch.block_m,
        BLOCK_N=launch.block_n,
        PRECISION=precision,
        **launch.options,
        enable_fp_fusion=False,  # as in the sparse kernel
    )


def coarse_gradients(
    launcher: Launcher,
    means: torch.Tensor,
    lse: torch.Tensor,
    preprocessed: Preprocessed,
    scale: float,
    launch: BlockLaunch,
    precision: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the means of query `[P, N, D]`, and of key and value `[1, 2, P, N, D]`, fp32."""
    assert preprocessed.grad_coarse is not None
    batch_heads, num_tiles, dim = preprocessed.grad_coarse.shape
    grad_mean_query = launcher.empty(lse, (batch_heads, num_tiles, dim))
    grad_mean_kv = launcher.empty(lse, (1, 2, batch_heads, num_tiles, dim))
    launcher.launch(
        coarse_gradient_kernel,
        (-(-num_tiles // launch.block_m) * batch_heads, 2),
        means,
        lse,
        preprocessed.grad_coarse,
        preprocessed.coarse_delta,
        grad_mean_query,
        grad_mean_kv,
        batch_heads,
        num_tiles,
        scale,
        scale * math.log2(math.e),
        HEAD_DIM=dim,
        BLOCK_D=power_of_two(dim),
        BLOCK_M=launch.block_m,
        BLOCK_N=launch.block_n,
        PRECISION=precision,
        **launch.options,
    )
    return grad_mean_query, grad_mean_kv
