"""The gradients of pooled keys and values (merge): a program per block of tiles walks all queries.

It is split where there are few tiles; `backward_key.py` adds them up and spreads them over the tiles.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ...problem import Problem
from ..arguments import grid_arguments, power_of_two, strides
from ..buffers import BackwardTensors, PooledTiles, Preprocessed
from ..plans import BlockLaunch
from ..primitives.geometry import SIZES, slot_offset, tile_box, tile_row
from ..primitives.rows import load_lse_and_delta, load_rows
from ..recording import Launcher
from .backward_key import dkdv_step


@triton.jit(do_not_specialize=SIZES)
def pooled_dkdv_kernel(
    query,
    grad_output,
    query_rows,
    grad_rows,
    lse_and_delta,
    selected_bits,
    pooled_kv,
    log_size,
    grad_mean_kv,
    scale,
    logit_scale,
    query_b,
    query_s,
    query_h,
    grad_b,
    grad_s,
    grad_h,
    heads,
    batch_heads,
    num_tiles,
    splits,
    tokens_before,
    length,
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
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (M tiles of one head; a split of the query tiles): gradients of the pooled keys and values."""
    grid = (video_t, video_h, video_w, tiles_h, tiles_w)
    TILED: tl.constexpr = query_rows is not None
    TILE: tl.constexpr = BLOCK[0] * BLOCK[1] * BLOCK[2]
    STEPS: tl.constexpr = (TILE + BLOCK_N - 1) // BLOCK_N
    blocks = tl.cdiv(num_tiles, BLOCK_M)
    batch_head = (tl.program_id(0) // blocks).to(tl.int64)
    own_tile = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    batch = batch_head // heads
    head = batch_head % heads
    dim = tl.arange(0, BLOCK_D)
    own_mask = own_tile < num_tiles
    video_tokens = video_t * video_h * video_w
    own = pooled_kv + batch_head * num_tiles * HEAD_DIM
    planes = batch_heads.to(tl.int64) * num_tiles * HEAD_DIM
    k = load_rows(own, own_tile * HEAD_DIM, own_mask, dim, HEAD_DIM, BLOCK_D)  # [M, BLOCK_D]
    v = load_rows(own + planes, own_tile * HEAD_DIM, own_mask, dim, HEAD_DIM, BLOCK_D)  # [M, BLOCK_D]
    weight = tl.load(log_size + own_tile, own_mask, other=float("-inf"))
    words = selected_bits + (batch_head * tl.cdiv(num_tiles, 32) + own_tile // 32) * num_tiles
    lse_and_delta += batch_head * length
    plane = batch_heads.to(tl.int64) * length
    if TILED:
        query_base = query_rows + batch_head * video_tokens * HEAD_DIM
        grad_base = grad_rows + batch_head * video_tokens * HEAD_DIM
    else:
        query_base = query + batch * query_b + head * query_h + tokens_before.to(tl.int64) * query_s
        grad_base = grad_output + batch * grad_b + head * grad_h + tokens_before.to(tl.int64) * grad_s
    dk = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    share = tl.cdiv(num_tiles, splits)
    begin = tl.program_id(1) * share
    end = tl.minimum(begin + share, num_tiles)
    for step in tl.range(begin * STEPS, end * STEPS, num_stages=STAGES):
        tile = step // STEPS
        inside = step % STEPS * BLOCK_N + tl.arange(0, BLOCK_N)
        t, h, w, extent_t, extent_h, extent_w = tile_box(tile, grid, BLOCK)
        present = inside < extent_t * extent_h * extent_w
        if TILED:
            offset = tile_row(t, h, w, extent_t, extent_h, video_h, video_w) + inside
        else:
            offset = (t * video_h + h) * video_w + w + slot_offset(inside, extent_h, extent_w, video_h, video_w)
        offset = offset.to(tl.int64)
        q = load_rows(query_base, offset * (HEAD_DIM if TILED else query_s), present, dim, HEAD_DIM, BLOCK_D)
        grad = load_rows(grad_base, offset * (HEAD_DIM if TILED else grad_s), present, dim, HEAD_DIM, BLOCK_D)
        lse, delta = load_lse_and_delta(lse_and_delta, plane, offset, present)
        word = tl.load(words + tile, own_mask, other=-1)
        bias = tl.where(((word >> (own_tile % 32)) & 1) == 0, weight, float("-inf"))
        dk, dv = dkdv_step(k, v, q, grad, lse, delta, dk, dv, logit_scale, bias, PRECISION)
    grad_mean_kv += tl.program_id(1).to(tl.int64) * 2 * planes
    to = batch_head * num_tiles * HEAD_DIM + own_tile[:, None] * HEAD_DIM + dim[None, :]
    mask = own_mask[:, None] & (dim[None, :] < HEAD_DIM)
    tl.store(grad_mean_kv + to, dk * scale, mask)
    tl.store(grad_mean_kv + planes + to, dv, mask)


def pooled_dkdv(
    launcher: Launcher,
    tensors: BackwardTensors,
    pooled: PooledTiles,
    preprocessed: Preprocessed,
    selected_bits: torch.Tensor,
    problem: Problem,
    launch: BlockLaunch,
    splits: int,
) -> torch.Tensor:
    """Gradients of the pooled keys and values, fp32 `[splits, 2, P, N, D]`, to be added up over the splits."""
    query = tensors.query
    batch, sequence, heads, dim = query.shape
    grid = problem.grid
    gradients = launcher.empty(preprocessed.lse_and_delta, (splits, 2, batch * heads, grid.num_tiles, dim))
    launcher.launch(
        pooled_dkdv_kernel,
        (-(-grid.num_tiles // launch.block_m) * batch * heads, splits),
        query,
        tensors.grad_output,
        *((None, None) if preprocessed.rows is None else preprocessed.rows.unbind(0)),
        preprocessed.lse_and_delta,
        selected_bits,
        pooled.pooled_kv,
        pooled.log_size,
        gradients,
        problem.scale,
        problem.scale * math.log2(math.e),
        *strides(query, tensors.grad_output),
        heads,
        batch * heads,
        grid.num_tiles,
        splits,
        problem.before,
        sequence,
        *grid_arguments(grid),
        HEAD_DIM=dim,
        BLOCK_D=power_of_two(dim),
        BLOCK_M=launch.block_m,
        BLOCK_N=launch.block_n,
        STAGES=launch.stages,
        PRECISION="ieee",
        **launch.options,
    )
    return gradients
