"""Coarse scores, coarse output and the exact top-k of every query tile, in one launch with bounded memory.

A program takes a few query tiles at a time. It writes their scores to rows of its own in a workspace, gathering the
coarse output by online softmax on the way, then finds each row's k-th highest score bit by bit and writes what is kept.

Shapes: B batch, H heads of this pass, N tiles, D head_dim, K kept tiles.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..torch_impl import Problem
from .geometry import SIZES, tile_box, tile_row
from .tuning import power_of_two

GROUP = 16  # keys of a partial tile are walked in groups of 16, the least that a matrix instruction takes
MAX_TILES = 16384
SCORES_PER_THREAD = 8


class Lists(NamedTuple):
    """What the sparse kernel walks, per head and query tile."""

    starts: torch.Tensor  # first row (or token) of every full tile kept, int32 [B, H, N, K]
    tail: torch.Tensor | None  # (first row or token, shape) of every group of the partial tiles kept, [B, H, N, G, 2]
    counts: torch.Tensor | None  # full tiles, groups: int32 [B, H, N, 2]
    kept: torch.Tensor | None  # one bit per tile: int32 [B, H, N, words]
    coarse: torch.Tensor | None  # fp32 [B, H, N, D]


@triton.jit
def _kth_highest(ordered, top_k, ROWS: tl.constexpr):
    """The `top_k`-th highest value of each row of int32 `[ROWS, KEYS]`, settled from the sign bit down."""
    threshold = tl.full((ROWS,), -2147483648, tl.int32)
    for bit in range(32):
        candidate = threshold ^ (tl.full((ROWS,), 1, tl.int32) << (31 - bit))
        above = tl.sum((ordered >= candidate[:, None]).to(tl.int32), 1)
        threshold = tl.where(above >= top_k, candidate, threshold)
    return threshold


@triton.jit
def _top_k(scores, valid, top_k, ROWS: tl.constexpr):
    """Which of the scores `[ROWS, KEYS]` are among the `top_k` highest; of equal ones, those further left."""
    bits = scores.to(tl.int32, bitcast=True)
    # Integers that order as the floats do; columns beyond the last tile come below them all.
    ordered = tl.where(valid, bits ^ ((bits >> 31) & 0x7FFFFFFF), -2147483648)
    threshold = _kth_highest(ordered, top_k, ROWS)
    above = ordered > threshold[:, None]
    level = ordered == threshold[:, None]
    missing = top_k - tl.sum(above.to(tl.int32), 1)
    return above | (level & (tl.cumsum(level.to(tl.int32), 1) <= missing[:, None]))


@triton.jit
def _write_lists(
    kept,
    column,
    row_mask,
    indices,
    starts,
    tail,
    counts,
    tail_width,
    top_k,
    video_t,
    video_h,
    video_w,
    tiles_h,
    tiles_w,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    TILED: tl.constexpr,
    PARTIAL: tl.constexpr,
    TAIL_GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Compact `kept` `[ROWS, KEYS]` into the rows that `indices`, `starts`, `tail` and `counts` `[ROWS]` point to."""
    kept = kept & row_mask[:, None]
    place = tl.cumsum(kept.to(tl.int32), 1) - 1
    tl.store(indices[:, None] + place, tl.broadcast_to(column[None, :], kept.shape), kept)
    t, h, w, extent_t, extent_h, extent_w = tile_box(
        column, video_t, video_h, video_w, tiles_h, tiles_w, BLOCK_T, BLOCK_H, BLOCK_W
    )
    if TILED:
        first = tile_row(t, h, w, extent_t, extent_h, video_h, video_w)
    else:
        first = (t * video_h + h) * video_w + w
    if PARTIAL:
        size = extent_t * extent_h * extent_w
        full = size == BLOCK_T * BLOCK_H * BLOCK_W
        groups = tl.where(full, 0, (size + GROUP - 1) // GROUP)
        groups = tl.where(kept, groups[None, :], 0)
        kept = kept & full[None, :]
        place = tl.cumsum(kept.to(tl.int32), 1) - 1
        position = tl.cumsum(groups, 1) - groups
        tl.store(counts, tl.sum(kept.to(tl.int32), 1), row_mask)
        tl.store(counts + 1, tl.sum(groups, 1), row_mask)
        for group in tl.static_range(TAIL_GROUPS):
            slots = tl.minimum(GROUP, size - group * GROUP)
            where = tail[:, None] + (position + group) * 2
            first_slot = first + group * GROUP if TILED else first
            # Bits 0-7: keys in the group; for rows in the order of the sequence also 8-15, 16-23: extents, 24: group.
            shape = slots if TILED else slots | (extent_h << 8) | (extent_w << 16) | (group << 24)
            tl.store(where, tl.broadcast_to(first_slot[None, :], groups.shape), groups > group)
            tl.store(where + 1, tl.broadcast_to(shape[None, :], groups.shape), groups > group)
    tl.store(starts[:, None] + place, tl.broadcast_to(first[None, :], kept.shape), kept)


@triton.jit(do_not_specialize=SIZES)
def select_kernel(
    means,
    scores,
    indices,
    starts,
    tail,
    counts,
    kept_bits,
    coarse,
    batch_heads,
    heads,
    num_tiles,
    top_k,
    tail_width,
    indices_b,
    scale,
    video_t,
    video_h,
    video_w,
    tiles_h,
    tiles_w,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    TILED: tl.constexpr,
    PARTIAL: tl.constexpr,
    TAIL_GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Each program walks blocks of BLOCK_M query tiles of one head, as many as there are programs apart."""
    workspace = scores + tl.program_id(0).to(tl.int64) * (BLOCK_M * KEYS)
    blocks = tl.cdiv(num_tiles, BLOCK_M)
    dim = tl.arange(0, BLOCK_D)
    lane = tl.arange(0, BLOCK_M)
    length = num_tiles * HEAD_DIM
    for task in range(tl.program_id(0), blocks * batch_heads, tl.num_programs(0)):
        place = (task // blocks).to(tl.int64)
        first = task % blocks * BLOCK_M
        row = first + lane
        mean_query = means + place * length
        mean_key = mean_query + batch_heads.to(tl.int64) * length
        own = row[:, None] * HEAD_DIM + dim[None, :]
        own_mask = (row[:, None] < num_tiles) & (dim[None, :] < HEAD_DIM)
        q = tl.load(mean_query + own, own_mask, other=0.0)  # [M, D]
        highest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        for start in range(0, num_tiles, BLOCK_N):
            column = start + tl.arange(0, BLOCK_N)
            at = column[:, None] * HEAD_DIM + dim[None, :]
            mask = (column[:, None] < num_tiles) & (dim[None, :] < HEAD_DIM)
            k = tl.load(mean_key + at, mask, other=0.0)  # [N, D]
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
            s = tl.where(column[None, :] < num_tiles, s, float("-inf"))
            tl.store(workspace + lane[:, None] * KEYS + column[None, :], s, column[None, :] < num_tiles)
            if coarse is not None:
                v = tl.load(mean_key + batch_heads.to(tl.int64) * length + at, mask, other=0.0)  # [N, D]
                new_highest = tl.maximum(highest, tl.max(s, 1))
                p = tl.exp(s - new_highest[:, None])
                shrink = tl.exp(highest - new_highest)
                total = total * shrink + tl.sum(p, 1)
                acc = tl.dot(p, v, acc * shrink[:, None], input_precision=PRECISION)
                highest = new_highest
        if coarse is not None:
            tl.store(coarse + place * length + own, acc / total[:, None], own_mask)
        tl.debug_barrier()  # the scores were written by other threads of this program than read them
        key = tl.arange(0, KEYS)
        for part in range(0, BLOCK_M, ROWS):
            line = first + part + tl.arange(0, ROWS)
            if first + part < num_tiles:
                lane_at = (part + tl.arange(0, ROWS))[:, None] * KEYS + key[None, :]
                valid = tl.broadcast_to(key[None, :] < num_tiles, (ROWS, KEYS))
                kept = _top_k(tl.load(workspace + lane_at, valid, other=0.0), valid, top_k, ROWS)
                entry = place * num_tiles + line
                owner = indices + (place // heads) * indices_b + ((place % heads) * num_tiles + line) * top_k
                _write_lists(
                    kept,
                    key,
                    line < num_tiles,
                    owner,
                    starts + entry * top_k,
                    tail + entry * (tail_width * 2) if PARTIAL else None,
                    counts + entry * 2 if PARTIAL else None,
                    tail_width,
                    top_k,
                    video_t,
                    video_h,
                    video_w,
                    tiles_h,
                    tiles_w,
                    BLOCK_T,
                    BLOCK_H,
                    BLOCK_W,
                    TILED,
                    PARTIAL,
                    TAIL_GROUPS,
                    GROUP,
                )
                if kept_bits is not None:
                    words = tl.reshape(kept.to(tl.int32), (ROWS, KEYS // 32, 32)) << tl.arange(0, 32)[None, None, :]
                    word = tl.arange(0, KEYS // 32)
                    bits_at = entry[:, None] * (KEYS // 32) + word[None, :]
                    tl.store(kept_bits + bits_at, tl.sum(words, 2), (line < num_tiles)[:, None] & (word[None, :] >= 0))
        tl.debug_barrier()  # the next block's scores take the same rows


@functools.lru_cache(maxsize=256)
def tail_width(problem: Problem) -> int:
    """The most groups that the partial tiles of one list can have; 0 where every tile is full."""
    grid = problem.grid
    sizes, full = {1}, 1
    for extent, block, tiles in zip(grid.video_shape, grid.block_size, grid.tiles_per_axis, strict=True):
        last = extent - (tiles - 1) * block
        sizes = {size * choice for size in sizes for choice in ({last} if tiles == 1 else {block, last})}
        full *= extent // block
    largest = max((size for size in sizes if size < grid.tile_capacity), default=0)
    return -(-largest // GROUP) * min(problem.top_k, grid.num_tiles - full)


def select(
    means: torch.Tensor,
    indices: torch.Tensor,
    problem: Problem,
    *,
    tiled: bool,
    processors: int,
    precision: str,
    stages: int = 2,
) -> Lists:
    """Fill `indices` int32 `[B, H, N, K]`, ascending, and return what the sparse kernel walks.

    Args:
        means: pooled query, key and value, fp32 `[3, B, H, N, D]`.
        tiled: rows of the tile-ordered copy are meant, not tokens of the sequence.
        processors: the device's multiprocessors; a few programs run on each, with a workspace of their own.
    """
    _, batch, heads, num_tiles, dim = means.shape
    grid, top_k = problem.grid, problem.top_k
    keys = max(128, power_of_two(num_tiles))
    num_warps = 4 if keys <= 512 and dim <= 128 else 8 if keys <= 4096 else 16
    block_m = 16 if num_tiles <= 1024 or dim > 128 else 32
    rows = max(1, min(block_m, SCORES_PER_THREAD * 32 * num_warps // keys))
    width = tail_width(problem)
    coarse, merge = problem.combine in ("gate", "sum"), problem.combine == "merge"
    programs = min(processors * (4 if num_warps == 4 else 2), -(-num_tiles // block_m) * batch * heads)
    per_tile = (batch, heads, num_tiles)
    lists = Lists(
        starts=indices.new_empty((*per_tile, top_k)),
        tail=indices.new_empty((*per_tile, width, 2)) if width else None,
        counts=indices.new_empty((*per_tile, 2)) if width else None,
        kept=indices.new_empty((*per_tile, keys // 32)) if merge else None,
        coarse=means.new_empty((*per_tile, dim)) if coarse else None,
    )
    select_kernel[(programs,)](
        means,
        means.new_empty((programs, block_m, keys)),
        indices,
        lists.starts,
        lists.tail,
        lists.counts,
        lists.kept,
        lists.coarse,
        batch * heads,
        heads,
        num_tiles,
        top_k,
        width,
        indices.stride(0),
        problem.scale,
        *grid.video_shape,
        *grid.tiles_per_axis[1:],
        *grid.block_size,
        HEAD_DIM=dim,
        BLOCK_D=power_of_two(dim),
        BLOCK_M=block_m,
        BLOCK_N=32 if dim <= 128 else 16,
        ROWS=rows,
        KEYS=keys,
        TILED=tiled,
        PARTIAL=width > 0,
        TAIL_GROUPS=-(-(grid.tile_capacity - 1) // GROUP),
        GROUP=GROUP,
        PRECISION=precision,
        num_warps=num_warps,
        num_stages=stages,
    )
    return lists
