"""The loops of the sparse kernel over the video's keys.

M = BLOCK_M query rows, K_N = BLOCK_N keys of one step.
"""

import triton
import triton.language as tl

from .rows import list_start, load_rows, partial_rows
from .softmax import softmax_step


@triton.jit
def tile_loop(
    q,
    row_max,
    scale,
    key_base,
    value_base,
    key_descriptor,
    value_descriptor,
    full_tile_starts,
    first_start,
    partial_groups,
    selected_bits,
    pooled_kv,
    log_size,
    full_tiles,
    listed_tiles,
    keys_left,
    listed_keys,
    pooled_tiles,
    in_context,
    batch_head,
    row,
    key_s,
    value_s,
    batch_heads,
    num_tiles,
    video_h,
    video_w,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
    STAGES: tl.constexpr,
    PARTIAL_STAGES: tl.constexpr,
    TILED: tl.constexpr,
    HAS_CONTEXT: tl.constexpr,
    BOUNDED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Attend to the video: full tiles, then partial ones, then (merge) the pooled tiles that are not kept."""
    TILE: tl.constexpr = BLOCK[0] * BLOCK[1] * BLOCK[2]
    STEPS: tl.constexpr = (TILE + BLOCK_N - 1) // BLOCK_N
    column = tl.arange(0, BLOCK_N)
    dim = tl.arange(0, BLOCK_D)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)

    # Full tiles, without masks.
    next_start = first_start
    for step in tl.range(0, full_tiles * STEPS, num_stages=STAGES):
        inside = step % STEPS * BLOCK_N + column
        start = next_start
        next_start = list_start(full_tile_starts, (step + 1) // STEPS, listed_tiles, in_context, TILE, HAS_CONTEXT)
        exists = inside < TILE if TILE % BLOCK_N != 0 else None
        bias = tl.where(exists, 0.0, float("-inf")) if TILE % BLOCK_N != 0 else None
        if key_descriptor is not None:
            first = start + step % STEPS * BLOCK_N
            k = key_descriptor.load([batch_head.to(tl.int32), first, 0]).reshape(BLOCK_N, BLOCK_D)  # [K_N, BLOCK_D]
            v = value_descriptor.load([batch_head.to(tl.int32), first, 0]).reshape(BLOCK_N, BLOCK_D)  # [K_N, BLOCK_D]
        elif TILED:
            first = start.to(tl.int64) * HEAD_DIM
            k = load_rows(key_base + first, inside * HEAD_DIM, exists, dim, HEAD_DIM, BLOCK_D)  # [K_N, BLOCK_D]
            v = load_rows(value_base + first, inside * HEAD_DIM, exists, dim, HEAD_DIM, BLOCK_D)  # [K_N, BLOCK_D]
        else:
            frame, line_h, line_w = inside // (BLOCK[1] * BLOCK[2]), inside // BLOCK[2] % BLOCK[1], inside % BLOCK[2]
            offset = (frame * video_h + line_h) * video_w + line_w
            if HAS_CONTEXT:
                offset = tl.where(in_context, inside, offset)
            first = start.to(tl.int64)
            k = load_rows(key_base + first * key_s, offset * key_s, exists, dim, HEAD_DIM, BLOCK_D)  # [K_N, BLOCK_D]
            v = load_rows(
                value_base + first * value_s, offset * value_s, exists, dim, HEAD_DIM, BLOCK_D
            )  # [K_N, BLOCK_D]
        row_max, row_sum, acc = softmax_step(q, k, v, row_max, row_sum, acc, scale, bias, BOUNDED, PRECISION)

    # Partial tiles, in groups of 16 keys; for context queries, the rows that the loop above left over.
    if partial_groups is not None or HAS_CONTEXT:
        for first in tl.range(0, keys_left, BLOCK_N, num_stages=PARTIAL_STAGES):
            inside = first + column
            exists = inside < keys_left
            offset = full_tiles * TILE + inside
            if partial_groups is not None:
                from_list = inside < listed_keys
                listed, there = partial_rows(partial_groups, inside, from_list, video_h, video_w, TILED, GROUP)
                if HAS_CONTEXT:
                    exists &= (inside >= listed_keys) | there
                    offset = tl.where(in_context, offset, listed)
                else:
                    exists &= there
                    offset = listed
            offset = offset.to(tl.int64)
            k = load_rows(key_base, offset * (HEAD_DIM if TILED else key_s), exists, dim, HEAD_DIM, BLOCK_D)
            v = load_rows(value_base, offset * (HEAD_DIM if TILED else value_s), exists, dim, HEAD_DIM, BLOCK_D)
            bias = tl.where(exists, 0.0, float("-inf"))
            row_max, row_sum, acc = softmax_step(q, k, v, row_max, row_sum, acc, scale, bias, BOUNDED, PRECISION)

    # Merge: one pooled key and value for each tile that is not kept, as heavy as the tile is large.
    if pooled_kv is not None:
        mean_key = pooled_kv + batch_head * num_tiles * HEAD_DIM
        mean_value = mean_key + batch_heads.to(tl.int64) * num_tiles * HEAD_DIM
        # More stages than two would take the room of a second program.
        for first in tl.range(0, pooled_tiles, BLOCK_N, num_stages=min(STAGES, 2)):
            index = first + column
            exists = index < num_tiles
            word = tl.load(selected_bits + index // 32, exists, other=-1)
            exists &= ((word >> (index % 32)) & 1) == 0
            bias = tl.load(log_size + index, exists, other=float("-inf"))
            k = load_rows(mean_key, index * HEAD_DIM, exists, dim, HEAD_DIM, BLOCK_D)
            v = load_rows(mean_value, index * HEAD_DIM, exists, dim, HEAD_DIM, BLOCK_D)
            row_max, row_sum, acc = softmax_step(q, k, v, row_max, row_sum, acc, scale, bias, BOUNDED, PRECISION)
    return row_max, row_sum, acc
