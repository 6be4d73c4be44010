"""Coarse scores and coarse output, then the exact top-k of every query tile, in two launches with bounded memory.

`scores_kernel` writes the scores of a block of query tiles to a workspace, and gathers their coarse output by online
softmax on the way. `top_k_kernel` takes one row of it, finds the k-th highest score bit by bit and writes what is kept;
a short row belongs to one warp, since every bit needs a sum over it. Where all scores do not fit the workspace,
the two take turns.

Shapes: B batch, H heads of this pass, N tiles, D head_dim, K kept tiles.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..tiles import TileGrid
from ..torch_impl import Problem
from .geometry import SIZES, SLICED, grid_arguments, tile_box, tile_row, workspace_width
from .pool import Pooled
from .quarters import quarter_scores
from .replay import Work
from .tuning import power_of_two

GROUP = 16  # keys of a partial tile are walked in groups of 16, the least that a matrix instruction takes
MAX_TILES = 16384
SCORES_OF_A_WARP = 1024  # top_k_kernel gives longer rows to several
LEAST_WORKSPACE_BYTES = 2**26


class Lists(NamedTuple):
    """What the sparse kernel walks, per head and query tile."""

    starts: torch.Tensor  # first row (or token) of every full tile kept, int32 [B, H, N, K]
    tail: torch.Tensor | None  # (first row or token, shape) of every group of the partial tiles kept, [B, H, N, G, 2]
    counts: torch.Tensor | None  # full tiles, groups: int32 [B, H, N, 2]
    kept: torch.Tensor | None  # one bit per tile: int32 [B, H, N, words]
    coarse: torch.Tensor | None  # fp32 [B, H, N, D]
    reach: torch.Tensor  # norm of the longest key, fp32 [B, H]
    progress: torch.Tensor  # zeros, where programs that keep in step count themselves: int32 [B, H, N]


@triton.jit
def _ordered(scores, valid):
    """Integers that order as the scores do; columns beyond the last tile come below them all."""
    bits = scores.to(tl.int32, bitcast=True)
    return tl.where(valid, bits ^ ((bits >> 31) & 0x7FFFFFFF), -2147483648)


@triton.jit
def _threshold(ordered, top_k, ROWS: tl.constexpr):
    """For each row of int32 `[ROWS, KEYS]` a number that `top_k` values reach, or, where values are alike, the highest
    that at least so many reach; settled from the sign bit down, no further than it takes."""
    threshold = tl.full((ROWS,), -2147483648, tl.int32)
    reached = tl.full((ROWS,), -1, tl.int32)
    bit = 31
    while (bit >= 0) & (tl.sum((reached != top_k).to(tl.int32), 0) > 0):
        candidate = threshold ^ (tl.full((ROWS,), 1, tl.int32) << bit)
        count = tl.sum((ordered >= candidate[:, None]).to(tl.int32), 1)
        enough = (count >= top_k) & (reached != top_k)
        threshold = tl.where(enough, candidate, threshold)
        reached = tl.where(enough, count, reached)
        bit -= 1
    return threshold


@triton.jit(do_not_specialize=SIZES)
def scores_kernel(
    means,
    scores,
    coarse,
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
    """Program (block of query tiles): `BLOCK_M` rows of the workspace `[rows, width]`, from row `first_row` of all."""
    blocks = tl.cdiv(num_tiles, BLOCK_M)
    task = first_row // BLOCK_M + tl.program_id(0)
    place = (task // blocks).to(tl.int64)
    block = task % blocks
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    dim = tl.arange(0, BLOCK_D)
    length = num_tiles * HEAD_DIM
    mean_query = means + place * length
    mean_key = mean_query + batch_heads.to(tl.int64) * length
    mean_value = mean_key + batch_heads.to(tl.int64) * length
    own = row[:, None] * HEAD_DIM + dim[None, :]
    own_mask = (row[:, None] < num_tiles) & (dim[None, :] < HEAD_DIM)
    q = tl.load(mean_query + own, own_mask, other=0.0)  # [M, D]
    lane = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    highest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(0, num_tiles, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        at = column[:, None] * HEAD_DIM + dim[None, :]
        mask = (column[:, None] < num_tiles) & (dim[None, :] < HEAD_DIM)
        k = tl.load(mean_key + at, mask, other=0.0)  # [N, D]
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        if scores is not None:
            to = lane[:, None] * workspace_width(num_tiles) + column[None, :]
            tl.store(scores + to, s, column[None, :] < num_tiles)
        if coarse is not None:
            s = tl.where(column[None, :] < num_tiles, s, float("-inf"))
            v = tl.load(mean_value + at, mask, other=0.0)  # [N, D]
            new_highest = tl.maximum(highest, tl.max(s, 1))
            p = tl.exp(s - new_highest[:, None])
            shrink = tl.exp(highest - new_highest)
            total = total * shrink + tl.sum(p, 1)
            acc = tl.dot(p, v, acc * shrink[:, None], input_precision=PRECISION)
            highest = new_highest
    if coarse is not None:
        tl.store(coarse + place * length + own, acc / total[:, None], own_mask)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=SLICED)
def top_k_kernel(
    scores,
    longest,
    indices,
    starts,
    tail,
    counts,
    kept_bits,
    reach,
    progress,
    first_row,
    heads,
    batch_heads,
    num_tiles,
    top_k,
    tail_width,
    indices_b,
    video_t,
    video_h,
    video_w,
    tiles_h,
    tiles_w,
    BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    PART: tl.constexpr,
    TILED: tl.constexpr,
    PARTIAL: tl.constexpr,
    TAIL_GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Program (`ROWS` rows of the workspace). Rows of all heads are counted with each head's last block full."""
    grid = (video_t, video_h, video_w, tiles_h, tiles_w)
    padded = tl.cdiv(num_tiles, BLOCK_M) * BLOCK_M
    first = first_row + tl.program_id(0) * ROWS
    line = first % padded + tl.arange(0, ROWS)
    lane = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    scores_at = scores + lane[:, None] * workspace_width(num_tiles)
    if first % padded >= num_tiles:
        return
    key = tl.arange(0, KEYS)[None, :]
    every = tl.broadcast_to(key < num_tiles, (ROWS, KEYS))
    row = _ordered(tl.load(scores_at + key, every, other=0.0), every)
    threshold = _threshold(row, top_k, ROWS)
    missing = top_k - tl.sum((row > threshold[:, None]).to(tl.int32), 1)
    level = tl.sum((every & (row == threshold[:, None])).to(tl.int32), 1)
    crowded = tl.sum((level > missing).to(tl.int32), 0) > 0

    place = (first // padded).to(tl.int64)
    entry = place * num_tiles + line
    row_mask = line < num_tiles
    indices_at = indices + ((place // heads) * indices_b + ((place % heads) * num_tiles + line) * top_k)[:, None]
    starts_at = starts + (entry * top_k)[:, None]
    level_before = tl.zeros((ROWS,), tl.int32)
    kept_before = tl.zeros((ROWS,), tl.int32)
    full_before = tl.zeros((ROWS,), tl.int32)
    groups_before = tl.zeros((ROWS,), tl.int32)
    for begin in range(0, num_tiles, PART):
        column = begin + tl.arange(0, PART)
        valid = row_mask[:, None] & (column[None, :] < num_tiles)
        ordered = _ordered(tl.load(scores_at + column[None, :], valid, other=0.0), valid)
        kept = valid & (ordered >= threshold[:, None])
        if crowded:
            # Of equal scores, those further left are kept.
            alike = (valid & (ordered == threshold[:, None])).to(tl.int32)
            rank = level_before[:, None] + tl.cumsum(alike, 1)
            kept = kept & ((alike == 0) | (rank <= missing[:, None]))
            level_before += tl.sum(alike, 1)
        if kept_bits is not None:
            bits = tl.reshape(kept.to(tl.int32), (ROWS, PART // 32, 32)) << tl.arange(0, 32)[None, None, :]
            word = begin // 32 + tl.arange(0, PART // 32)
            bits_at = entry[:, None] * (KEYS // 32) + word[None, :]
            tl.store(kept_bits + bits_at, tl.sum(bits, 2), row_mask[:, None] & (word[None, :] < KEYS // 32))

        t, h, w, extent_t, extent_h, extent_w = tile_box(column, grid, BLOCK)
        if TILED:
            token = tile_row(t, h, w, extent_t, extent_h, video_h, video_w)
        else:
            token = (t * video_h + h) * video_w + w
        size = extent_t * extent_h * extent_w
        groups = tl.where(size < BLOCK[0] * BLOCK[1] * BLOCK[2], (size + GROUP - 1) // GROUP, 0)
        groups = tl.where(kept, groups[None, :], 0)
        full = kept & (groups == 0)
        # Three counts run in one number: tiles kept, full tiles, groups of partial tiles.
        count = kept.to(tl.int32) | (full.to(tl.int32) << 9) | (groups << 18)
        running = tl.cumsum(count, 1)
        at = kept_before[:, None] + (running & 511) - 1
        tl.store(indices_at + at, tl.broadcast_to(column[None, :], kept.shape), kept)
        at = full_before[:, None] + ((running >> 9) & 511) - 1
        tl.store(starts_at + at, tl.broadcast_to(token[None, :], kept.shape), full)
        if PARTIAL:
            at = entry[:, None] * tail_width + groups_before[:, None] + (running >> 18) - groups
            for group in tl.static_range(TAIL_GROUPS):
                slots = tl.minimum(GROUP, size - group * GROUP)
                first_slot = token + group * GROUP if TILED else token
                # Bits 0-7: keys in the group; for rows in the order of the sequence also 8-15, 16-23: extents,
                # 24: group.
                shape = slots if TILED else slots | (extent_h << 8) | (extent_w << 16) | (group << 24)
                tl.store(tail + (at + group) * 2, tl.broadcast_to(first_slot[None, :], kept.shape), groups > group)
                tl.store(tail + (at + group) * 2 + 1, tl.broadcast_to(shape[None, :], kept.shape), groups > group)
        total = tl.sum(count, 1)
        kept_before += total & 511
        full_before += (total >> 9) & 511
        groups_before += total >> 18
    if PARTIAL:
        tl.store(counts + entry * 2, full_before, row_mask)
        tl.store(counts + entry * 2 + 1, groups_before, row_mask)
    tl.store(progress + entry, 0, row_mask)
    if first % padded == 0:  # whoever has a head's first tile also finds its longest key
        tile = tl.arange(0, KEYS)
        norm = tl.load(longest + (batch_heads + place) * num_tiles + tile, tile < num_tiles, other=0.0)
        tl.store(reach + place, tl.max(norm, 0))


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


def workspace_bytes(elements: int) -> int:
    """Room for scores beside a key of so many elements: an eighth of what key and value take in 16 bits, if not more.

    The fewer turns scores and top-k take, the more programs each of their launches has.
    """
    return max(LEAST_WORKSPACE_BYTES, elements // 2)


def tail_groups(grid: TileGrid) -> dict[str, int]:
    """What the kernels that write lists must know of partial tiles: how many groups the largest makes."""
    return {"TAIL_GROUPS": -(-(grid.tile_capacity - 1) // GROUP), "GROUP": GROUP}


def select(
    work: Work, pooled: Pooled, indices: torch.Tensor, problem: Problem, *, tiled: bool, precision: str
) -> Lists:
    """Fill `indices` int32 `[B, H, N, K]`, ascending, and return what the sparse kernel walks.

    Args:
        tiled: rows of the tile-ordered copy are meant, not tokens of the sequence.
        precision: of the products between tile means.
    """
    means = pooled.means
    _, batch, heads, num_tiles, dim = means.shape
    grid, top_k = problem.grid, problem.top_k
    keys = max(128, power_of_two(num_tiles))
    block_m = 16 if dim > 128 or batch * heads * num_tiles < 16384 else 32
    width = tail_width(problem)
    coarse, merge = problem.combine in ("gate", "sum"), problem.combine == "merge"
    per_tile = (batch, heads, num_tiles)
    lists = Lists(
        starts=work.empty(indices, (*per_tile, top_k)),
        tail=work.empty(indices, (*per_tile, width, 2)) if width else None,
        counts=work.empty(indices, (*per_tile, 2)) if width else None,
        kept=work.empty(indices, (*per_tile, keys // 32)) if merge else None,
        coarse=work.empty(means, (*per_tile, dim)) if coarse else None,
        reach=work.empty(means, (batch, heads)),
        progress=work.empty(indices, per_tile),
    )
    one_warp = keys <= SCORES_OF_A_WARP
    rows = max(1, 256 // keys)
    all_rows = batch * heads * -(-num_tiles // block_m) * block_m
    row_bytes = 4 * (-(-num_tiles // 32) * 32)
    at_once = workspace_bytes(batch * heads * grid.num_tokens * dim) // (row_bytes * block_m) * block_m
    at_once = min(all_rows, max(block_m, at_once))
    scores = work.empty(means, (at_once, row_bytes // 4))
    for first_row in range(0, all_rows, at_once):
        some_rows = min(at_once, all_rows - first_row)
        if coarse or pooled.quarters is None:
            work.launch(
                scores_kernel,
                (some_rows // block_m,),
                means,
                scores if pooled.quarters is None else None,
                lists.coarse,
                first_row,
                batch * heads,
                num_tiles,
                problem.scale,
                HEAD_DIM=dim,
                BLOCK_D=power_of_two(dim),
                BLOCK_M=block_m,
                BLOCK_N=32 if dim <= 128 else 16,
                PRECISION=precision,
                num_warps=4,
                num_stages=2,
                enable_fp_fusion=False,  # as in the sparse kernel
            )
        if pooled.quarters is not None:
            numbers = (first_row, some_rows, problem.scale)
            quarter_scores(work, pooled, scores, *numbers, block_m=block_m, precision=precision)
        work.launch(
            top_k_kernel,
            (some_rows // rows,),
            scores,
            pooled.longest,
            indices,
            lists.starts,
            lists.tail,
            lists.counts,
            lists.kept,
            lists.reach,
            lists.progress,
            first_row,
            heads,
            batch * heads,
            num_tiles,
            top_k,
            width,
            indices.stride(0),
            *grid_arguments(grid),
            BLOCK_M=block_m,
            ROWS=rows,
            KEYS=keys,
            PART=128 if one_warp else 256,
            TILED=tiled,
            PARTIAL=width > 0,
            **tail_groups(grid),
            num_warps=1 if one_warp else min(16, keys // 512),
        )
    return lists
