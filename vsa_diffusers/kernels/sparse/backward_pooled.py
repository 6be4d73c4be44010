"""The gradients of pooled keys and values (merge): a program per block of tiles walks all queries.

It is cut into parts where there are few tiles; `backward_key.py` adds them up and spreads them over the tiles.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ...problem import Problem
from ..arguments import grid_arguments, power_of_two
from ..buffers import Pooled, Prepared
from ..plans import TAIL, Launch
from ..primitives.geometry import slot_offset, tile_box, tile_row
from ..primitives.rows import BACKWARD_SIZES, load_rows, load_stats
from ..recording import Work
from .backward_key import key_step

PROXY_PROGRAMS = 512  # a launch of fewer programs is cut into parts


@triton.jit(do_not_specialize=BACKWARD_SIZES)
def proxy_gradient_kernel(
    query,
    grad_output,
    query_rows,
    grad_rows,
    stats,
    bits,
    proxies,
    log_size,
    mean_gradients,
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
    parts,
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
    """Program (M tiles of one head; part of the query tiles): gradients of the pooled keys and values."""
    grid = (video_t, video_h, video_w, tiles_h, tiles_w)
    TILED: tl.constexpr = query_rows is not None
    TILE: tl.constexpr = BLOCK[0] * BLOCK[1] * BLOCK[2]
    STEPS: tl.constexpr = (TILE + BLOCK_N - 1) // BLOCK_N
    blocks = tl.cdiv(num_tiles, BLOCK_M)
    place = (tl.program_id(0) // blocks).to(tl.int64)
    row = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    item = place // heads
    head = place % heads
    dim = tl.arange(0, BLOCK_D)
    row_mask = row < num_tiles
    video_tokens = video_t * video_h * video_w
    own = proxies + place * num_tiles * HEAD_DIM
    planes = batch_heads.to(tl.int64) * num_tiles * HEAD_DIM
    k = load_rows(own, row * HEAD_DIM, row_mask, dim, HEAD_DIM, BLOCK_D)  # [M, BLOCK_D]
    v = load_rows(own + planes, row * HEAD_DIM, row_mask, dim, HEAD_DIM, BLOCK_D)  # [M, BLOCK_D]
    weight = tl.load(log_size + row, row_mask, other=float("-inf"))
    words = bits + (place * tl.cdiv(num_tiles, 32) + row // 32) * num_tiles
    stats += place * length
    plane = batch_heads.to(tl.int64) * length
    if TILED:
        query_base = query_rows + place * video_tokens * HEAD_DIM
        grad_base = grad_rows + place * video_tokens * HEAD_DIM
    else:
        query_base = query + item * query_b + head * query_h + tokens_before.to(tl.int64) * query_s
        grad_base = grad_output + item * grad_b + head * grad_h + tokens_before.to(tl.int64) * grad_s
    dk = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    share = tl.cdiv(num_tiles, parts)
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
        lse, delta = load_stats(stats, plane, offset, present)
        word = tl.load(words + tile, row_mask, other=-1)
        bias = tl.where(((word >> (row % 32)) & 1) == 0, weight, float("-inf"))
        dk, dv = key_step(k, v, q, grad, lse, delta, dk, dv, logit_scale, bias, PRECISION)
    mean_gradients += tl.program_id(1).to(tl.int64) * 2 * planes
    to = place * num_tiles * HEAD_DIM + row[:, None] * HEAD_DIM + dim[None, :]
    mask = row_mask[:, None] & (dim[None, :] < HEAD_DIM)
    tl.store(mean_gradients + to, dk * scale, mask)
    tl.store(mean_gradients + planes + to, dv, mask)


def proxy_gradients(
    work: Work,
    query: torch.Tensor,
    grad_output: torch.Tensor,
    pooled: Pooled,
    prepared: Prepared,
    bits: torch.Tensor,
    problem: Problem,
    launch: Launch,
) -> torch.Tensor:
    """Gradients of the pooled keys and values, fp32 `[parts, 2, P, N, D]`, to be added up over the parts."""
    batch, sequence, heads, dim = query.shape
    grid = problem.grid
    block_m = 64 if dim <= 128 else 32
    most = launch.keys if dim <= 64 else min(launch.keys, TAIL)  # its masks take the registers that more would need
    block_n = max(16, min(most, power_of_two(grid.tile_capacity)))
    programs = -(-grid.num_tiles // block_m) * batch * heads
    parts = max(1, min(grid.num_tiles, PROXY_PROGRAMS // programs))
    gradients = work.empty(prepared.stats, (parts, 2, batch * heads, grid.num_tiles, dim))
    work.launch(
        proxy_gradient_kernel,
        (programs, parts),
        query,
        grad_output,
        *((None, None) if prepared.rows is None else prepared.rows.unbind(0)),
        prepared.stats,
        bits,
        pooled.proxies,
        pooled.log_size,
        gradients,
        problem.scale,
        problem.scale * math.log2(math.e),
        *query.stride()[:3],
        *grad_output.stride()[:3],
        heads,
        batch * heads,
        grid.num_tiles,
        parts,
        problem.before,
        sequence,
        *grid_arguments(grid),
        HEAD_DIM=dim,
        BLOCK_D=power_of_two(dim),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        STAGES=launch.stages,
        PRECISION="ieee",
        **launch.options,
    )
    return gradients
