"""The lists of the backward pass: per query tile the tiles it keeps, per key tile the query tiles that keep it.

Both come from the kept indices, ascend, and are built without the host knowing their lengths. The lists of all key
tiles of a head lie one after another; together they are exactly as long as those of its query tiles.

Shapes: B batch, H heads of this pass, P = B * H, N tiles, K kept tiles, W = ceil(N / 32) words.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...problem import Problem
from ..arguments import full_tiles_and_groups, grid_arguments, tail_groups, tail_width
from ..buffers import Keepers, Kept
from ..primitives.geometry import SLICED, tile_box, tile_row
from ..primitives.rows import BACKWARD_SIZES
from ..primitives.tile_lists import GROUP, append_tiles, write_lists
from ..recording import Work

PART = 64  # list entries that a program takes at a time
LINES = 32  # key tiles that a program puts in order


@triton.jit(do_not_specialize=BACKWARD_SIZES, do_not_specialize_on_alignment=SLICED)
def restore_kernel(
    indices,
    boxes,
    starts,
    tail,
    counts,
    bits,
    heads,
    num_tiles,
    top_k,
    tail_width,
    indices_b,
    BLOCK: tl.constexpr,
    TILED: tl.constexpr,
    TAIL_GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    PART: tl.constexpr,
):
    """Program (query tile of one head). Its bits are cleared first."""
    place = (tl.program_id(0) // num_tiles).to(tl.int64)
    line = tl.program_id(0) % num_tiles
    entry = place * num_tiles + line
    listed = indices + (place // heads) * indices_b + ((place % heads) * num_tiles + line) * top_k
    words = bits + place * tl.cdiv(num_tiles, 32) * num_tiles + line
    for begin in range(0, tl.cdiv(num_tiles, 32), PART):
        word = begin + tl.arange(0, PART)
        tl.store(words + word.to(tl.int64) * num_tiles, tl.zeros((PART,), tl.int32), word < tl.cdiv(num_tiles, 32))
    tl.debug_barrier()
    for begin in range(0, top_k, PART):
        column = begin + tl.arange(0, PART)
        exists = column < top_k
        tile = tl.load(listed + column, exists, other=0)
        bit = tl.full((PART,), 1, tl.int32) << (tile % 32)
        tl.atomic_or(words + (tile // 32).to(tl.int64) * num_tiles, bit, exists, sem="relaxed")
    write_lists(
        listed,
        boxes,
        starts,
        tail,
        counts,
        entry,
        top_k,
        tail_width,
        BLOCK,
        TILED,
        TAIL_GROUPS,
        GROUP,
        PART,
    )


@triton.jit(do_not_specialize=BACKWARD_SIZES)
def invert_kernel(
    bits,
    counts,
    offsets,
    starts,
    tail,
    num_tiles,
    full_length,
    tail_length,
    video_t,
    video_h,
    video_w,
    tiles_h,
    tiles_w,
    BLOCK: tl.constexpr,
    TILED: tl.constexpr,
    TAIL_GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    PART: tl.constexpr,
):
    """Program (32 key tiles of one head): counts the query tiles that keep them; given `starts`, lists them."""
    grid = (video_t, video_h, video_w, tiles_h, tiles_w)
    words = tl.cdiv(num_tiles, 32)
    place = (tl.program_id(0) // words).to(tl.int64)
    word = tl.program_id(0) % words
    lane = tl.arange(0, 32)
    line = word * 32 + lane
    line_mask = line < num_tiles
    entry = (place * num_tiles + line) * 2
    bits += (place * words + word) * num_tiles
    if starts is not None:
        starts += place * full_length + tl.load(offsets + entry, line_mask, other=0)
        if tail is not None:
            tail += place * tail_length + tl.load(offsets + entry + 1, line_mask, other=0)
    full_before = tl.zeros((32,), tl.int32)
    groups_before = tl.zeros((32,), tl.int32)
    for begin in range(0, num_tiles, PART):
        tile = begin + tl.arange(0, PART)
        column = tl.load(bits + tile, tile < num_tiles, other=0)
        kept = ((column[None, :] >> lane[:, None]) & 1) != 0  # [32, PART]
        t, h, w, extent_t, extent_h, extent_w = tile_box(tile, grid, BLOCK)
        if TILED:
            first = tile_row(t, h, w, extent_t, extent_h, video_h, video_w)
        else:
            first = (t * video_h + h) * video_w + w
        full_before, groups_before = append_tiles(
            kept,
            (first[None, :], extent_t[None, :], extent_h[None, :], extent_w[None, :]),
            starts,
            tail,
            full_before,
            groups_before,
            BLOCK,
            TILED,
            TAIL_GROUPS,
            GROUP,
        )
    if starts is None:
        tl.store(counts + entry, full_before, line_mask)
        tl.store(counts + entry + 1, groups_before, line_mask)


@triton.jit(do_not_specialize=BACKWARD_SIZES)
def order_kernel(
    counts,
    offsets,
    order,
    num_tiles,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
    LINES: tl.constexpr,
    PART: tl.constexpr,
):
    """Program (`LINES` key tiles of one head): where their lists begin, and their rank, the longest first."""
    blocks = tl.cdiv(num_tiles, LINES)
    place = (tl.program_id(0) // blocks).to(tl.int64)
    line = tl.program_id(0) % blocks * LINES + tl.arange(0, LINES)
    line_mask = line < num_tiles
    counts += place * num_tiles * 2
    rows = tl.load(counts + line * 2, line_mask, other=0) * TILE
    rows += tl.load(counts + line * 2 + 1, line_mask, other=0) * GROUP
    full_before = tl.zeros((LINES,), tl.int32)
    groups_before = tl.zeros((LINES,), tl.int32)
    rank = tl.zeros((LINES,), tl.int32)
    for begin in range(0, num_tiles, PART):
        tile = begin + tl.arange(0, PART)
        full = tl.load(counts + tile * 2, tile < num_tiles, other=0)[None, :]
        groups = tl.load(counts + tile * 2 + 1, tile < num_tiles, other=0)[None, :]
        earlier = tile[None, :] < line[:, None]  # [LINES, PART]
        full_before += tl.sum(tl.where(earlier, full, 0), 1)
        groups_before += tl.sum(tl.where(earlier, groups, 0), 1)
        its_rows = tl.where(tile[None, :] < num_tiles, full * TILE + groups * GROUP, -1)
        rank += tl.sum(((its_rows > rows[:, None]) | ((its_rows == rows[:, None]) & earlier)).to(tl.int32), 1)
    entry = (place * num_tiles + line) * 2
    tl.store(offsets + entry, full_before, line_mask)
    tl.store(offsets + entry + 1, groups_before, line_mask)
    tl.store(order + place * num_tiles + rank, line, line_mask)


def restore(work: Work, indices: torch.Tensor, boxes: torch.Tensor, problem: Problem, *, tiled: bool) -> Kept:
    """The lists that the forward pass walked, from `indices` int32 `[B, H, N, K]`.

    `tiled` says that `boxes`, of the pool pass, hold rows of the tile-ordered copy instead of tokens of the sequence.
    """
    batch, heads, num_tiles, top_k = indices.shape
    grid, width = problem.grid, tail_width(problem)
    places = batch * heads
    kept = Kept(
        starts=work.empty(indices, (places, num_tiles, top_k)),
        tail=work.empty(indices, (places, num_tiles, width), torch.int64) if width else None,
        counts=work.empty(indices, (places, num_tiles, 2)),
        bits=work.empty(indices, (places, -(-num_tiles // 32), num_tiles)),
    )
    work.launch(
        restore_kernel,
        (places * num_tiles,),
        indices,
        boxes,
        kept.starts,
        kept.tail,
        kept.counts,
        kept.bits,
        heads,
        num_tiles,
        top_k,
        width,
        indices.stride(0),
        BLOCK=grid.block_size,
        TILED=tiled,
        **tail_groups(grid),
        PART=PART,
        num_warps=1,
    )
    return kept


def invert(work: Work, bits: torch.Tensor, problem: Problem, *, tiled: bool) -> Keepers:
    """The lists of the key tiles, from the bits of `Kept`."""
    places, words, num_tiles = bits.shape
    grid, top_k = problem.grid, problem.top_k
    full_tiles, groups = full_tiles_and_groups(problem)
    keepers = Keepers(
        starts=work.empty(bits, (places, top_k * full_tiles)),
        tail=work.empty(bits, (places, top_k * groups), torch.int64) if groups else None,
        counts=work.empty(bits, (places, num_tiles, 2)),
        offsets=work.empty(bits, (places, num_tiles, 2)),
        order=work.empty(bits, (places, num_tiles)),
    )

    def walk(offsets, starts, tail) -> None:
        work.launch(
            invert_kernel,
            (places * words,),
            bits,
            keepers.counts,
            offsets,
            starts,
            tail,
            num_tiles,
            top_k * full_tiles,
            top_k * groups,
            *grid_arguments(grid),
            TILED=tiled,
            **tail_groups(grid),
            PART=PART,
            num_warps=4,
        )

    walk(None, None, None)
    work.launch(
        order_kernel,
        (places * -(-num_tiles // LINES),),
        keepers.counts,
        keepers.offsets,
        keepers.order,
        num_tiles,
        TILE=grid.tile_capacity,
        GROUP=GROUP,
        LINES=LINES,
        PART=PART,
        num_warps=4,
    )
    walk(keepers.offsets, keepers.starts, keepers.tail)
    return keepers
