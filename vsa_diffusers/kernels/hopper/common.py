"""What the producer and consumer warps of the Hopper kernel share: layouts, and where a query tile lies."""

# Tuples are taken apart whole, so that one sees what is in them.
# ruff: noqa: RUF059

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..primitives.geometry import tile_box

ROWS = gl.constexpr(64)
# How the products lay out logits.
LOGITS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
# The bits of a logit's column that depend on the thread; the others are known when compiling.
THREAD_BITS = gl.constexpr(6)
SHARED = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))
BOX = gl.constexpr(gl.NVMMASharedLayout(128, 16, 5))
# The 128-byte swizzle stores panels of 64 columns, so a buffer of head_dim 128 is two panels of all its rows.
PANEL_COLUMNS = gl.constexpr(64)


@gluon.constexpr_function
def rows_layout(dim):
    """How rows of so many columns lie in the registers of four warps when they are loaded and stored."""
    return gl.BlockedLayout([1, 8], [256 // dim, dim // 8], [4, 1], [1, 0])


@gluon.constexpr_function
def output_layout(dim):
    """How the products lay out outputs."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, dim, 16])


@gluon.jit
def query_tile(task, heads, num_tiles, grid, BLOCK: gl.constexpr):
    """Batch item and head of a task, and its tile: first token `(t, h, w)` and extents."""
    batch_head = task // num_tiles
    t, h, w, extent_t, extent_h, extent_w = tile_box(task % num_tiles, grid, BLOCK)
    return batch_head // heads, batch_head % heads, t, h, w, extent_t, extent_h, extent_w


@gluon.jit
def first_token(tile, grid):
    """Where a query tile begins, counted in tokens of the sequence."""
    batch, head, t, h, w, extent_t, extent_h, extent_w = tile
    video_t, video_h, video_w, tiles_h, tiles_w = grid
    return ((t * video_h + h) * video_w + w).to(gl.int64)


@gluon.jit
def rows_exist(tile, BLOCK: gl.constexpr, LAYOUT: gl.constexpr):
    """Which of a query tile's 64 rows are tokens. Here those of a partial tile lie where they would in a full one."""
    batch, head, t, h, w, extent_t, extent_h, extent_w = tile
    slot = gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    inside = (slot // (BLOCK[1] * BLOCK[2]) < extent_t) & (slot // BLOCK[2] % BLOCK[1] < extent_h)
    return inside & (slot % BLOCK[2] < extent_w)


@gluon.jit
def row_pointers(base, tile, strides, in_full, grid, DIM: gl.constexpr):
    """Where the rows `[64, DIM]` of a query tile begin in a tensor `[B, S, H, D]` with these strides, given tokens
    between the first one and the others."""
    batch, head, t, h, w, extent_t, extent_h, extent_w = tile
    stride_b, stride_s, stride_h = strides
    base += batch.to(gl.int64) * stride_b + head.to(gl.int64) * stride_h + first_token(tile, grid) * stride_s
    dim = gl.arange(0, DIM, gl.SliceLayout(0, rows_layout(DIM)))
    return base + (in_full.to(gl.int64) * stride_s)[:, None] + dim[None, :]


@gluon.jit
def load_task(task, lists, numbers, GROUP: gl.constexpr):
    """What a task begins with, asked for while another one runs: the bound of its logits, full tiles in its list, keys
    of partial ones, and where the first tile begins."""
    full_tile_starts, partial_groups, list_lengths, max_norm, max_key_norm, needs_online = lists
    tasks, heads, batch_heads, num_tiles, top_k, partial_width, bits_width, scale = numbers
    exists = task < tasks
    row = gl.cast(task, gl.int64)
    bound = gl.load(max_norm + row, exists, other=0.0) * gl.load(max_key_norm + task // num_tiles, exists, other=0.0)
    full_tiles = top_k
    listed_keys = 0
    if list_lengths is not None:
        full_tiles = gl.load(list_lengths + row * 2, exists, other=0)
        listed_keys = gl.load(list_lengths + row * 2 + 1, exists, other=0) * GROUP
    first_start = gl.load(full_tile_starts + row * top_k, exists, other=0)
    return bound * gl.abs(scale), full_tiles, listed_keys, first_start


@gluon.jit
def valid_context(context_mask, batch, index, context_tokens):
    """Which context tokens exist and are not padding."""
    exists = index < context_tokens
    if context_mask is not None:
        exists &= gl.load(context_mask + batch * context_tokens + index, exists, other=0) != 0
    return exists
