"""How lists of tiles are written: first rows of the full ones, and the partial ones in groups of rows.

A list of full tiles holds int32. A group of a partial tile is one int64. Its low half is the group's first row in the
tile-ordered copy, or its tile's first token in the order of the sequence. Its high half holds in bits 0 to 7 how many
rows there are, and in the order of the sequence also the tile's extents along height and width in 8 to 15 and 16 to 23,
and which group of the tile it is from 24 on. `partial_rows` in `rows.py` reads them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .geometry import pack, unpack

GROUP = 16  # rows of a partial tile go in groups of 16, the least that a matrix instruction takes


@triton.jit
def store_box(to, first, extent_t, extent_h, extent_w):
    """Note where a tile begins, in the low half, and its extents, in eight bits each of the high half."""
    tl.store(to, pack(first, extent_t | (extent_h << 8) | (extent_w << 16)))


@triton.jit
def load_box(pointers, exists):
    """First row (or token) and extents of tiles, 0 where `exists` says that there is none."""
    first, extents = unpack(tl.load(pointers, exists, other=0))
    return first, extents & 255, (extents >> 8) & 255, extents >> 16


@triton.jit
def append_tiles(
    listed,
    box,
    full_tile_starts,
    partial_groups,
    full_before,
    groups_before,
    BLOCK: tl.constexpr,
    TILED: tl.constexpr,
    MAX_GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Append tiles to lists that begin at these pointers `[LISTS]` and hold so many full tiles and groups.

    Args:
        listed: which of the tiles go into which list, `[LISTS, CHUNK]`.
        box: first rows (or tokens) of the tiles, and their extents, `[CHUNK]` or `[LISTS, CHUNK]` each.
        full_tile_starts: nothing is written where it is `None`.
        partial_groups: `None` where there are no partial tiles.

    Returns: full tiles and groups of every list after that.
    """
    first, extent_t, extent_h, extent_w = box
    size = extent_t * extent_h * extent_w
    is_full = size == BLOCK[0] * BLOCK[1] * BLOCK[2]
    full = (listed & is_full).to(tl.int32)
    groups = tl.where(listed & ~is_full, (size + GROUP - 1) // GROUP, 0)
    count = full | (groups << 16)  # both run in one number
    if full_tile_starts is not None:
        running = tl.cumsum(count, 1) - count
        index = full_before[:, None] + (running & 65535)
        tl.store(full_tile_starts[:, None] + index, tl.broadcast_to(first, full.shape), full != 0)
        if partial_groups is not None:
            index = partial_groups[:, None] + groups_before[:, None] + (running >> 16)
            for group in tl.static_range(MAX_GROUPS):
                slots = tl.minimum(GROUP, size - group * GROUP)
                if TILED:
                    pair = pack(first + group * GROUP, slots)
                else:
                    pair = pack(first, slots | (extent_h << 8) | (extent_w << 16) | (group << 24))
                tl.store(index + group, tl.broadcast_to(pair, groups.shape), groups > group)
    total = tl.sum(count, 1)
    return full_before + (total & 65535), groups_before + (total >> 16)


@triton.jit
def write_lists(
    indices,
    boxes,
    full_tile_starts,
    partial_groups,
    list_lengths,
    row,
    top_k,
    partial_width,
    BLOCK: tl.constexpr,
    TILED: tl.constexpr,
    MAX_GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Write the lists of one query tile, the `row`-th of all, from the `top_k` kept tiles at `indices`.

    Args:
        boxes: what `store_box` noted of every tile, for rows or for tokens as `TILED` says.
        list_lengths: where to say how many full tiles and groups there are; `None` where nobody asks.
        CHUNK: tiles that are taken at a time.
    """
    row += tl.arange(0, 1)
    full_before = tl.zeros((1,), tl.int32)
    groups_before = tl.zeros((1,), tl.int32)
    for begin in range(0, top_k, CHUNK):
        column = begin + tl.arange(0, CHUNK)[None, :]
        listed = column < top_k
        tile = tl.load(indices + column, listed, other=0)
        full_before, groups_before = append_tiles(
            listed,
            load_box(boxes + tile, listed),
            full_tile_starts + row * top_k,
            partial_groups + row * partial_width if partial_groups is not None else None,
            full_before,
            groups_before,
            BLOCK,
            TILED,
            MAX_GROUPS,
            GROUP,
        )
    if list_lengths is not None:
        tl.store(list_lengths + row * 2, full_before)
        tl.store(list_lengths + row * 2 + 1, groups_before)
