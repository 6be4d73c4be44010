"""Where the tokens of a tile lie, as Triton helpers. `tiles.py` states the same order for the host.

The tokens of a tile are numbered over its valid tokens only: slot s of a tile of e_t x e_h x e_w tokens is token
(s // (e_w * e_h), s // e_w % e_h, s % e_w) of it. A tile-ordered copy holds the tiles one after another, unpadded.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Integer arguments whose values must not make variants of a kernel: all but strides of batch, sequence and heads.
SIZES = (
    *("heads", "batch_heads", "num_tiles", "video_t", "video_h", "video_w", "tiles_h", "tiles_w"),
    *("tokens_before", "tokens_after", "length", "top_k", "first_row", "tasks", "sync_chunks", "splits"),
    *("partial_width", "bits_width", "full_length", "partial_length", "indices_b", "lse_b"),
)
# Sliced pointers: whether 16 divides their address varies with the problem's size, and a variant for it would be
# compiled anew.
SLICED = ("lse", "indices")


@triton.jit
def tile_box(
    tile,
    grid,
    BLOCK: tl.constexpr,
):
    """First token `(t, h, w)` and extents of a tile, or of a vector of tiles."""
    video_t, video_h, video_w, tiles_h, tiles_w = grid
    t = tile // (tiles_w * tiles_h) * BLOCK[0]
    h = tile // tiles_w % tiles_h * BLOCK[1]
    w = tile % tiles_w * BLOCK[2]
    return (
        t,
        h,
        w,
        tl.minimum(BLOCK[0], video_t - t),
        tl.minimum(BLOCK[1], video_h - h),
        tl.minimum(BLOCK[2], video_w - w),
    )


@triton.jit
def quotient(slot, extent):
    """`slot // extent` for slots below 128; the half keeps the rounded quotient clear of whole numbers."""
    return ((slot.to(tl.float32) + 0.5) / extent).to(tl.int32)


@triton.jit
def slot_offset(slot, extent_h, extent_w, video_h, video_w):
    """Tokens between a tile's first one and the one in `slot`, in the order of the sequence."""
    row = quotient(slot, extent_w)
    frame = quotient(slot, extent_w * extent_h)
    return (frame * video_h + row - frame * extent_h) * video_w + slot - row * extent_w


@triton.jit
def tile_row(t, h, w, extent_t, extent_h, video_h, video_w):
    """Row of a tile's first token in the tile-ordered copy: the tokens of all tiles before it."""
    return t * video_h * video_w + extent_t * (h * video_w + extent_h * w)


@triton.jit
def pack(low, high):
    """Two numbers of 31 bits in one of 64, which memory takes and gives at a time."""
    return low.to(tl.int64) | (high.to(tl.int64) << 32)


@triton.jit
def unpack(pair):
    """What `pack` was given."""
    return pair.to(tl.int32), (pair >> 32).to(tl.int32)


@triton.jit
def workspace_width(num_tiles):
    """Scores between two rows of the workspace, so many that rows begin at whole cache lines."""
    return tl.cdiv(num_tiles, 32) * 32
