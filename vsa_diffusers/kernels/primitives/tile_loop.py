"""The loops over what a tile's list names, used by the forward and by both gradients.

A loop hands `STEP` two tiles of rows at a time, keys and values or queries and gradients:

    state = STEP(x, y, position, exists, bias, own, state, BOUNDED, PRECISION)

`x` and `y` are `[L, BLOCK_D]`, `position` and `exists` `[L]` (`None`: all exist), `bias` `[L]` is added to logits in
base 2 (`None`: nothing), `own` is what the program has of its own rows, and `state` is what it accumulates.

`source` is where rows lie: `(x_base, y_base, x_stride, y_stride)`. L = BLOCK_N rows of one step.
"""

import triton
import triton.language as tl

from .rows import block_offset, list_start, load_rows, partial_rows


@triton.jit
def full_loop(
    STEP: tl.constexpr,
    own,
    state,
    source,
    descriptors,
    full_tile_starts,
    full_tiles,
    listed_tiles,
    in_context,
    batch_head,
    video_h,
    video_w,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    TILED: tl.constexpr,
    HAS_CONTEXT: tl.constexpr,
    BOUNDED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Full tiles of a list, without masks. A program of context rows takes all video rows in order, tile by tile.

    Args:
        descriptors: of the tile-ordered copies of both, `None` where rows are read by pointers.
        full_tiles: how many to take, of which `listed_tiles` are in the list.
    """
    x_base, y_base, x_stride, y_stride = source
    x_descriptor, y_descriptor = descriptors
    TILE: tl.constexpr = BLOCK[0] * BLOCK[1] * BLOCK[2]
    STEPS: tl.constexpr = (TILE + BLOCK_N - 1) // BLOCK_N
    RAGGED: tl.constexpr = TILE % BLOCK_N != 0
    column = tl.arange(0, BLOCK_N)
    dim = tl.arange(0, BLOCK_D)
    next_start = list_start(full_tile_starts, 0, listed_tiles, in_context, TILE, HAS_CONTEXT)
    for step in tl.range(0, full_tiles * STEPS, num_stages=STAGES):
        inside = step % STEPS * BLOCK_N + column
        start = next_start
        next_start = list_start(full_tile_starts, (step + 1) // STEPS, listed_tiles, in_context, TILE, HAS_CONTEXT)
        exists = inside < TILE if RAGGED else None
        bias = tl.where(exists, 0.0, float("-inf")) if RAGGED else None
        offset = inside
        if x_descriptor is not None:
            row = start + step % STEPS * BLOCK_N
            x = x_descriptor.load([batch_head.to(tl.int32), row, 0]).reshape(BLOCK_N, BLOCK_D)  # [L, BLOCK_D]
            y = y_descriptor.load([batch_head.to(tl.int32), row, 0]).reshape(BLOCK_N, BLOCK_D)  # [L, BLOCK_D]
        elif TILED:
            row = start.to(tl.int64) * HEAD_DIM
            x = load_rows(x_base + row, inside * HEAD_DIM, exists, dim, HEAD_DIM, BLOCK_D)  # [L, BLOCK_D]
            y = load_rows(y_base + row, inside * HEAD_DIM, exists, dim, HEAD_DIM, BLOCK_D)  # [L, BLOCK_D]
        else:
            offset = block_offset(inside, video_h, video_w, BLOCK)
            if HAS_CONTEXT:
                offset = tl.where(in_context, inside, offset)
            row = start.to(tl.int64)
            x = load_rows(x_base + row * x_stride, offset * x_stride, exists, dim, HEAD_DIM, BLOCK_D)  # [L, BLOCK_D]
            y = load_rows(y_base + row * y_stride, offset * y_stride, exists, dim, HEAD_DIM, BLOCK_D)  # [L, BLOCK_D]
        state = STEP(x, y, start + offset, exists, bias, own, state, BOUNDED, PRECISION)
    return state


@triton.jit
def partial_loop(
    STEP: tl.constexpr,
    own,
    state,
    source,
    partial_groups,
    rows_before,
    rows_left,
    listed_rows,
    video_h,
    video_w,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
    STAGES: tl.constexpr,
    TILED: tl.constexpr,
    BOUNDED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Partial tiles of a list, in groups of rows; for context rows, what `full_loop` left over of the video.

    Args:
        rows_before: rows that `full_loop` took of the video in order.
        rows_left: how many rows to take, of which the first `listed_rows` are in the list.
    """
    x_base, y_base, x_stride, y_stride = source
    dim = tl.arange(0, BLOCK_D)
    for first in tl.range(0, rows_left, BLOCK_N, num_stages=STAGES):
        inside = first + tl.arange(0, BLOCK_N)
        exists = inside < rows_left
        offset = rows_before + inside
        if partial_groups is not None:
            from_list = inside < listed_rows
            listed, there = partial_rows(partial_groups, inside, from_list, video_h, video_w, TILED, GROUP)
            exists &= there | ~from_list
            offset = tl.where(from_list, listed, offset)
        offset = offset.to(tl.int64)
        x = load_rows(x_base, offset * (HEAD_DIM if TILED else x_stride), exists, dim, HEAD_DIM, BLOCK_D)
        y = load_rows(y_base, offset * (HEAD_DIM if TILED else y_stride), exists, dim, HEAD_DIM, BLOCK_D)
        bias = tl.where(exists, 0.0, float("-inf"))
        state = STEP(x, y, offset, exists, bias, own, state, BOUNDED, PRECISION)
    return state


@triton.jit
def pooled_loop(
    STEP: tl.constexpr,
    own,
    state,
    pooled_kv,
    log_size,
    words,
    word_stride,
    pooled_tiles,
    batch_head,
    batch_heads,
    num_tiles,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    BOUNDED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Merge: one pooled key and value for each tile that is not kept, as heavy as the tile is large.

    Args:
        words: bits of the tiles that are kept, `word_stride` words apart.
        pooled_tiles: how many tiles to look at: all, or none for context rows.
    """
    dim = tl.arange(0, BLOCK_D)
    mean_key = pooled_kv + batch_head * num_tiles * HEAD_DIM
    mean_value = mean_key + batch_heads.to(tl.int64) * num_tiles * HEAD_DIM
    for first in tl.range(0, pooled_tiles, BLOCK_N, num_stages=STAGES):
        index = first + tl.arange(0, BLOCK_N)
        exists = index < num_tiles
        word = tl.load(words + index // 32 * word_stride, exists, other=-1)
        exists &= ((word >> (index % 32)) & 1) == 0
        bias = tl.load(log_size + index, exists, other=float("-inf"))
        k = load_rows(mean_key, index * HEAD_DIM, exists, dim, HEAD_DIM, BLOCK_D)  # [L, BLOCK_D]
        v = load_rows(mean_value, index * HEAD_DIM, exists, dim, HEAD_DIM, BLOCK_D)  # [L, BLOCK_D]
        state = STEP(k, v, index, exists, bias, own, state, BOUNDED, PRECISION)
    return state


@triton.jit
def context_loop(
    STEP: tl.constexpr,
    own,
    state,
    source,
    context_mask,
    tokens_before,
    context_tokens,
    video_tokens,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Context tokens before and after the video; their positions come after those of the video.

    Args:
        context_mask: of this batch item, not 0 where a token counts; `None` where all do.
    """
    x_base, y_base, x_stride, y_stride = source
    dim = tl.arange(0, BLOCK_D)
    for first in tl.range(0, context_tokens, BLOCK_N, num_stages=1):
        index = first + tl.arange(0, BLOCK_N)
        exists = index < context_tokens
        if context_mask is not None:
            exists &= tl.load(context_mask + index, exists, other=0) != 0
        offset = tl.where(index < tokens_before, index, index + video_tokens).to(tl.int64)
        x = load_rows(x_base, offset * x_stride, exists, dim, HEAD_DIM, BLOCK_D)  # [L, BLOCK_D]
        y = load_rows(y_base, offset * y_stride, exists, dim, HEAD_DIM, BLOCK_D)  # [L, BLOCK_D]
        bias = tl.where(exists, 0.0, float("-inf"))
        state = STEP(x, y, video_tokens + index, exists, bias, own, state, False, PRECISION)
    return state
