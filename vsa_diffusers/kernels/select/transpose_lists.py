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
from ..arguments import full_tiles_and_groups, grid_arguments, group_constants, partial_width
from ..buffers import KeyLists, QueryLists
from ..plans import BlockLaunch
from ..primitives.geometry import SIZES, SLICED, tile_box, tile_row
from ..primitives.tile_lists import GROUP, append_tiles, write_lists
from ..recording import Launcher


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=SLICED)
def rebuild_lists_kernel(
    indices,
    boxes,
    full_tile_starts,
    partial_groups,
    list_lengths,
    selected_bits,
    heads,
    num_tiles,
    top_k,
    partial_width,
    indices_b,
    BLOCK: tl.constexpr,
    TILED: tl.constexpr,
    MAX_GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Program (query tile of one head). Its bits are cleared first."""
    batch_head = (tl.program_id(0) // num_tiles).to(tl.int64)
    query_tile = tl.program_id(0) % num_tiles
    row = batch_head * num_tiles + query_tile
    listed = indices + (batch_head // heads) * indices_b + ((batch_head % heads) * num_tiles + query_tile) * top_k
    words = selected_bits + batch_head * tl.cdiv(num_tiles, 32) * num_tiles + query_tile
    for begin in range(0, tl.cdiv(num_tiles, 32), CHUNK):
        word = begin + tl.arange(0, CHUNK)
        tl.store(words + word.to(tl.int64) * num_tiles, tl.zeros((CHUNK,), tl.int32), word < tl.cdiv(num_tiles, 32))
    tl.debug_barrier()
    for begin in range(0, top_k, CHUNK):
        column = begin + tl.arange(0, CHUNK)
        exists = column < top_k
        tile = tl.load(listed + column, exists, other=0)
        bit = tl.full((CHUNK,), 1, tl.int32) << (tile % 32)
        tl.atomic_or(words + (tile // 32).to(tl.int64) * num_tiles, bit, exists, sem="relaxed")
    write_lists(
        listed,
        boxes,
        full_tile_starts,
        partial_groups,
        list_lengths,
        row,
        top_k,
        partial_width,
        BLOCK,
        TILED,
        MAX_GROUPS,
        GROUP,
        CHUNK,
    )


@triton.jit(do_not_specialize=SIZES)
def transpose_lists_kernel(
    selected_bits,
    list_lengths,
    offsets,
    full_tile_starts,
    partial_groups,
    num_tiles,
    full_length,
    partial_length,
    video_t,
    video_h,
    video_w,
    tiles_h,
    tiles_w,
    BLOCK: tl.constexpr,
    TILED: tl.constexpr,
    MAX_GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Program (32 key tiles of one head): counts the query tiles that keep them, or, with `offsets`, lists them."""
    grid = (video_t, video_h, video_w, tiles_h, tiles_w)
    words = tl.cdiv(num_tiles, 32)
    batch_head = (tl.program_id(0) // words).to(tl.int64)
    word = tl.program_id(0) % words
    lane = tl.arange(0, 32)
    key_tile = word * 32 + lane
    key_tile_mask = key_tile < num_tiles
    offset = (batch_head * num_tiles + key_tile) * 2
    selected_bits += (batch_head * words + word) * num_tiles
    if full_tile_starts is not None:
        full_tile_starts += batch_head * full_length + tl.load(offsets + offset, key_tile_mask, other=0)
        if partial_groups is not None:
            partial_groups += batch_head * partial_length + tl.load(offsets + offset + 1, key_tile_mask, other=0)
    full_before = tl.zeros((32,), tl.int32)
    groups_before = tl.zeros((32,), tl.int32)
    for begin in range(0, num_tiles, CHUNK):
        tile = begin + tl.arange(0, CHUNK)
        column = tl.load(selected_bits + tile, tile < num_tiles, other=0)
        kept = ((column[None, :] >> lane[:, None]) & 1) != 0  # [32, CHUNK]
        t, h, w, extent_t, extent_h, extent_w = tile_box(tile, grid, BLOCK)
        if TILED:
            first = tile_row(t, h, w, extent_t, extent_h, video_h, video_w)
        else:
            first = (t * video_h + h) * video_w + w
        full_before, groups_before = append_tiles(
            kept,
            (first[None, :], extent_t[None, :], extent_h[None, :], extent_w[None, :]),
            full_tile_starts,
            partial_groups,
            full_before,
            groups_before,
            BLOCK,
            TILED,
            MAX_GROUPS,
            GROUP,
        )
    if full_tile_starts is None:
        tl.store(list_lengths + offset, full_before, key_tile_mask)
        tl.store(list_lengths + offset + 1, groups_before, key_tile_mask)


@triton.jit(do_not_specialize=SIZES)
def order_lists_kernel(
    list_lengths,
    offsets,
    order,
    num_tiles,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Program (`BLOCK_M` key tiles of one head): where their lists begin, and their rank, the longest first."""
    blocks = tl.cdiv(num_tiles, BLOCK_M)
    batch_head = (tl.program_id(0) // blocks).to(tl.int64)
    key_tile = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    key_tile_mask = key_tile < num_tiles
    list_lengths += batch_head * num_tiles * 2
    rows = tl.load(list_lengths + key_tile * 2, key_tile_mask, other=0) * TILE
    rows += tl.load(list_lengths + key_tile * 2 + 1, key_tile_mask, other=0) * GROUP
    full_before = tl.zeros((BLOCK_M,), tl.int32)
    groups_before = tl.zeros((BLOCK_M,), tl.int32)
    rank = tl.zeros((BLOCK_M,), tl.int32)
    for begin in range(0, num_tiles, CHUNK):
        tile = begin + tl.arange(0, CHUNK)
        full = tl.load(list_lengths + tile * 2, tile < num_tiles, other=0)[None, :]
        groups = tl.load(list_lengths + tile * 2 + 1, tile < num_tiles, other=0)[None, :]
        earlier = tile[None, :] < key_tile[:, None]  # [BLOCK_M, CHUNK]
        full_before += tl.sum(tl.where(earlier, full, 0), 1)
        groups_before += tl.sum(tl.where(earlier, groups, 0), 1)
        its_rows = tl.where(tile[None, :] < num_tiles, full * TILE + groups * GROUP, -1)
        rank += tl.sum(((its_rows > rows[:, None]) | ((its_rows == rows[:, None]) & earlier)).to(tl.int32), 1)
    offset = (batch_head * num_tiles + key_tile) * 2
    tl.store(offsets + offset, full_before, key_tile_mask)
    tl.store(offsets + offset + 1, groups_before, key_tile_mask)
    tl.store(order + batch_head * num_tiles + rank, key_tile, key_tile_mask)


def rebuild_lists(
    launcher: Launcher,
    indices: torch.Tensor,
    boxes: torch.Tensor,
    problem: Problem,
    launch: BlockLaunch,
    *,
    tiled: bool,
) -> QueryLists:
    """The lists that the forward pass walked, from `indices` int32 `[B, H, N, K]`.

    `tiled` says that `boxes`, of the pool pass, hold rows of the tile-ordered copy instead of tokens of the sequence.
    """
    batch, heads, num_tiles, top_k = indices.shape
    grid, width = problem.grid, partial_width(problem)
    batch_heads = batch * heads
    lists = QueryLists(
        full_tile_starts=launcher.empty(indices, (batch_heads, num_tiles, top_k)),
        partial_groups=launcher.empty(indices, (batch_heads, num_tiles, width), torch.int64) if width else None,
        list_lengths=launcher.empty(indices, (batch_heads, num_tiles, 2)),
        selected_bits=launcher.empty(indices, (batch_heads, -(-num_tiles // 32), num_tiles)),
    )
    launcher.launch(
        rebuild_lists_kernel,
        (batch_heads * num_tiles,),
        indices,
        boxes,
        lists.full_tile_starts,
        lists.partial_groups,
        lists.list_lengths,
        lists.selected_bits,
        heads,
        num_tiles,
        top_k,
        width,
        indices.stride(0),
        BLOCK=grid.block_size,
        TILED=tiled,
        **group_constants(grid),
        CHUNK=launch.block_n,
        **launch.options,
    )
    return lists


def transpose_lists(
    launcher: Launcher,
    selected_bits: torch.Tensor,
    problem: Problem,
    transpose: BlockLaunch,
    order: BlockLaunch,
    *,
    tiled: bool,
) -> KeyLists:
    """The lists of the key tiles, from the bits of `QueryLists`: their lengths, where they begin, and what is in them.

    `tiled` says that they name rows of the tile-ordered copy instead of tokens of the sequence.
    """
    batch_heads, words, num_tiles = selected_bits.shape
    grid, top_k = problem.grid, problem.top_k
    full_tiles, groups = full_tiles_and_groups(problem)
    lists = KeyLists(
        full_tile_starts=launcher.empty(selected_bits, (batch_heads, top_k * full_tiles)),
        partial_groups=launcher.empty(selected_bits, (batch_heads, top_k * groups), torch.int64) if groups else None,
        list_lengths=launcher.empty(selected_bits, (batch_heads, num_tiles, 2)),
        offsets=launcher.empty(selected_bits, (batch_heads, num_tiles, 2)),
        order=launcher.empty(selected_bits, (batch_heads, num_tiles)),
    )

    def read_bits(offsets, full_tile_starts, partial_groups) -> None:
        launcher.launch(
            transpose_lists_kernel,
            (batch_heads * words,),
            selected_bits,
            lists.list_lengths,
            offsets,
            full_tile_starts,
            partial_groups,
            num_tiles,
            top_k * full_tiles,
            top_k * groups,
            *grid_arguments(grid),
            TILED=tiled,
            **group_constants(grid),
            CHUNK=transpose.block_n,
            **transpose.options,
        )

    read_bits(None, None, None)
    launcher.launch(
        order_lists_kernel,
        (batch_heads * -(-num_tiles // order.block_m),),
        lists.list_lengths,
        lists.offsets,
        lists.order,
        num_tiles,
        TILE=grid.tile_capacity,
        GROUP=GROUP,
        BLOCK_M=order.block_m,
        CHUNK=order.block_n,
        **order.options,
    )
    read_bits(lists.offsets, lists.full_tile_starts, lists.partial_groups)
    return lists
