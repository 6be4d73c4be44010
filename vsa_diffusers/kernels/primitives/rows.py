"""What the kernels of the backward pass share: which rows a program answers for, and how rows are loaded.

A row's position counts the video tokens, in the order of the sequence or of the tiles, and then the context tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .geometry import slot_offset, tile_box, tile_row, unpack


@triton.jit
def task_of(program, heads, num_tiles, batch_heads, context_tokens, ROWS: tl.constexpr, HAS_CONTEXT: tl.constexpr):
    """Whether a program takes a block of context rows (these come first), its batch item, its head there and of all
    items, its tile and its context rows."""
    context_index = tl.arange(0, ROWS)
    if HAS_CONTEXT:
        blocks = tl.cdiv(context_tokens, ROWS)
        in_context = program < blocks * batch_heads
        rest = tl.where(in_context, program, program - blocks * batch_heads)
        batch_head = tl.where(in_context, rest // tl.maximum(blocks, 1), rest // num_tiles)
        tile = tl.where(in_context, 0, rest % num_tiles)
        context_index += rest % tl.maximum(blocks, 1) * ROWS
    else:
        in_context = program < 0
        batch_head = program // num_tiles
        tile = program % num_tiles
    batch = (batch_head // heads).to(tl.int64)
    head = (batch_head % heads).to(tl.int64)
    return in_context, batch, head, batch_head.to(tl.int64), tile, context_index


@triton.jit
def rows_of(
    in_context,
    tile,
    context_index,
    tokens_before,
    context_tokens,
    grid,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    TILED: tl.constexpr,
    HAS_CONTEXT: tl.constexpr,
):
    """Tokens of the sequence, their positions and which of them exist, `[ROWS]` each; and the tile's size."""
    video_t, video_h, video_w, _, _ = grid
    slot = tl.arange(0, ROWS)
    t, h, w, extent_t, extent_h, extent_w = tile_box(tile, grid, BLOCK)
    size = extent_t * extent_h * extent_w
    position = (t * video_h + h) * video_w + w + slot_offset(slot, extent_h, extent_w, video_h, video_w)
    tokens = tokens_before + position
    if TILED:
        position = tile_row(t, h, w, extent_t, extent_h, video_h, video_w) + slot
    exists = slot < size
    if HAS_CONTEXT:
        video_tokens = video_t * video_h * video_w
        tokens = tl.where(
            in_context, tl.where(context_index < tokens_before, context_index, context_index + video_tokens), tokens
        )
        position = tl.where(in_context, context_index + video_tokens, position)
        exists = tl.where(in_context, context_index < context_tokens, exists)
    return tokens.to(tl.int64), position.to(tl.int64), exists, size


@triton.jit
def list_start(full_tile_starts, index, listed_tiles, in_context, TILE: tl.constexpr, HAS_CONTEXT: tl.constexpr):
    """Where the tile at this index of a list begins.

    Loops ask for the next one while they work on one: looked up where it is used, it would take every other stage of
    the pipeline.
    """
    start = tl.load(full_tile_starts + index, mask=index < listed_tiles, other=0)
    if HAS_CONTEXT:
        start = tl.where(in_context, index * TILE, start)
    return start


@triton.jit
def load_rows(base, offset, exists, dim, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows `[ROWS, BLOCK_D]` that begin at `base + offset`; `exists` is `None` where every row does."""
    pointers = base + offset[:, None] + dim[None, :]
    if exists is not None:
        x = tl.load(pointers, exists[:, None] & (dim[None, :] < HEAD_DIM), other=0.0)
    elif HEAD_DIM < BLOCK_D:
        x = tl.load(pointers, dim[None, :] < HEAD_DIM, other=0.0)
    else:
        x = tl.load(pointers)
    return x


@triton.jit
def load_lse_and_delta(lse_and_delta, plane, position, exists):
    """Log-sum-exp (base 2) and delta of rows; a row that does not exist has no weight."""
    lse = tl.load(lse_and_delta + position, exists, other=float("inf"))
    delta = tl.load(lse_and_delta + plane + position, exists, other=0.0)
    return lse, delta


@triton.jit
def block_offset(inside, video_h, video_w, BLOCK: tl.constexpr):
    """Tokens between a full tile's first one and the one in slot `inside`, in the order of the sequence."""
    return (inside // (BLOCK[1] * BLOCK[2]) * video_h + inside // BLOCK[2] % BLOCK[1]) * video_w + inside % BLOCK[2]


@triton.jit
def partial_rows(first_group, inside, from_list, video_h, video_w, TILED: tl.constexpr, GROUP: tl.constexpr):
    """Rows of the partial tiles whose groups begin at `first_group`: their positions, and which of them exist."""
    start, shape = unpack(tl.load(first_group + inside // GROUP, from_list, other=0))
    member = inside % GROUP
    exists = member < (shape & 255)
    if TILED:
        position = start + member
    else:
        member += (shape >> 24) * GROUP
        extent_h, extent_w = tl.maximum((shape >> 8) & 255, 1), tl.maximum((shape >> 16) & 255, 1)
        position = start + slot_offset(member, extent_h, extent_w, video_h, video_w)
    return position, exists
