"""The sparse kernel: exact attention of a query tile over the tiles it keeps, and the combine, in one launch.

A program takes one query tile of one head. It walks its full tiles without masks, then the groups of its partial tiles,
then (merge) the pooled tiles it does not keep, then the context keys, all in one online softmax. A block of context
queries is a query tile that keeps everything: it walks all rows in order.

Shapes: B batch, H heads of this pass, S sequence, N tiles, V video tokens, D head_dim, K kept tiles, C context tokens.
M = BLOCK_M query rows, K_N = BLOCK_N keys of one step.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ..torch_impl import Problem
from .geometry import SIZES, slot_offset, tile_box
from .pool import Pooled
from .select import GROUP, Lists
from .tuning import Launch, power_of_two

LN2 = tl.constexpr(math.log(2))


@triton.jit
def _step(q, k, v, highest, total, acc, scale, bias, PRECISION: tl.constexpr):
    """One step of the online softmax in base 2; `bias` is added to the logits, `None` for full keys."""
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [M, K_N]
    if bias is None:
        new_highest = tl.maximum(highest, tl.max(s, 1) * scale)
        p = tl.math.exp2(s * scale - new_highest[:, None])
    else:
        s = s * scale + bias[None, :]
        new_highest = tl.maximum(highest, tl.max(s, 1))
        p = tl.math.exp2(s - new_highest[:, None])
    shrink = tl.math.exp2(highest - new_highest)
    total = total * shrink + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return new_highest, total, acc


@triton.jit
def _rows(base, offset, mask, dim, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows `[K_N, BLOCK_D]` that begin at `base + offset`; `mask` is `None` where every row exists."""
    at = base + offset[:, None] + dim[None, :]
    if mask is not None:
        x = tl.load(at, mask[:, None] & (dim[None, :] < HEAD_DIM), other=0.0)
    elif HEAD_DIM < BLOCK_D:
        x = tl.load(at, dim[None, :] < HEAD_DIM, other=0.0)
    else:
        x = tl.load(at)
    return x


@triton.jit(do_not_specialize=SIZES)
def attend_kernel(
    query,
    key,
    value,
    key_rows,
    value_rows,
    key_descriptor,
    value_descriptor,
    starts,
    tail,
    counts,
    kept,
    proxies,
    log_size,
    coarse,
    gate,
    context_mask,
    output,
    lse,
    scale,
    query_b,
    query_s,
    query_h,
    key_b,
    key_s,
    key_h,
    value_b,
    value_s,
    value_h,
    gate_b,
    gate_s,
    gate_h,
    output_b,
    output_s,
    output_h,
    lse_b,
    heads,
    batch_heads,
    num_tiles,
    top_k,
    tail_width,
    kept_width,
    tokens_before,
    tokens_after,
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
    GROUP: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_CONTEXT: tl.constexpr,
):
    """Programs: the blocks of context queries of all heads first (the longest), then query tiles, head by head."""
    TILED: tl.constexpr = key_rows is not None
    TILE: tl.constexpr = BLOCK_T * BLOCK_H * BLOCK_W
    STEPS: tl.constexpr = (TILE + BLOCK_N - 1) // BLOCK_N
    RAGGED: tl.constexpr = TILE % BLOCK_N != 0
    slot = tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    dim = tl.arange(0, BLOCK_D)
    video_tokens = video_t * video_h * video_w
    context_tokens = tokens_before + tokens_after

    # Which rows of the sequence this program answers for.
    program = tl.program_id(0)
    if HAS_CONTEXT:
        blocks = tl.cdiv(context_tokens, BLOCK_M)
        in_context = program < blocks * batch_heads
        program = tl.where(in_context, program, program - blocks * batch_heads)
        place = tl.where(in_context, program // tl.maximum(blocks, 1), program // num_tiles)
        tile = tl.where(in_context, 0, program % num_tiles)
        at = program % tl.maximum(blocks, 1) * BLOCK_M + slot
    else:
        place = program // num_tiles
        tile = program % num_tiles
    t, h, w, extent_t, extent_h, extent_w = tile_box(
        tile, video_t, video_h, video_w, tiles_h, tiles_w, BLOCK_T, BLOCK_H, BLOCK_W
    )
    size = extent_t * extent_h * extent_w
    tokens = tokens_before + (t * video_h + h) * video_w + w + slot_offset(slot, extent_h, extent_w, video_h, video_w)
    row_mask = slot < size
    if HAS_CONTEXT:
        tokens = tl.where(in_context, tl.where(at < tokens_before, at, at + video_tokens), tokens)
        row_mask = tl.where(in_context, at < context_tokens, row_mask)
    tokens = tokens.to(tl.int64)
    item = (place // heads).to(tl.int64)
    head = (place % heads).to(tl.int64)
    place = place.to(tl.int64)
    line = place * num_tiles + tile
    dim_mask = row_mask[:, None] & (dim[None, :] < HEAD_DIM)

    at_query = query + item * query_b + head * query_h + tokens[:, None] * query_s + dim[None, :]
    q = tl.load(at_query, dim_mask, other=0.0)  # [M, BLOCK_D]
    # The factor goes onto the fp32 logits; its sign goes onto q, so that the highest logit is the highest product.
    q = (q.to(tl.float32) * tl.where(scale < 0, -1.0, 1.0)).to(q.dtype)
    scale = tl.abs(scale)
    key += item * key_b + head * key_h
    value += item * value_b + head * value_h
    if TILED:
        key_base = key_rows + place * video_tokens * HEAD_DIM
        value_base = value_rows + place * video_tokens * HEAD_DIM
    else:
        key_base = key + tokens_before.to(tl.int64) * key_s
        value_base = value + tokens_before.to(tl.int64) * value_s

    highest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)

    # Full tiles, without masks.
    if tail is not None:
        full_tiles = tl.load(counts + line * 2)
        groups = tl.load(counts + line * 2 + 1)
    else:
        full_tiles = top_k
        groups = 0
    if HAS_CONTEXT:
        listed_tiles = tl.where(in_context, 0, full_tiles)
        full_tiles = tl.where(in_context, video_tokens // TILE, full_tiles)
    starts += line * top_k
    for step in tl.range(0, full_tiles * STEPS, num_stages=STAGES):
        index = step // STEPS
        inside = step % STEPS * BLOCK_N + column
        if HAS_CONTEXT:
            start = tl.where(in_context, index * TILE, tl.load(starts + index, mask=index < listed_tiles, other=0))
        else:
            start = tl.load(starts + index)
        exists = inside < TILE if RAGGED else None
        bias = tl.where(exists, 0.0, float("-inf")) if RAGGED else None
        if key_descriptor is not None:
            first = start + step % STEPS * BLOCK_N
            k = key_descriptor.load([place.to(tl.int32), first, 0]).reshape(BLOCK_N, BLOCK_D)  # [K_N, BLOCK_D]
            v = value_descriptor.load([place.to(tl.int32), first, 0]).reshape(BLOCK_N, BLOCK_D)  # [K_N, BLOCK_D]
        elif TILED:
            first = start.to(tl.int64) * HEAD_DIM
            k = _rows(key_base + first, inside * HEAD_DIM, exists, dim, HEAD_DIM, BLOCK_D)  # [K_N, BLOCK_D]
            v = _rows(value_base + first, inside * HEAD_DIM, exists, dim, HEAD_DIM, BLOCK_D)  # [K_N, BLOCK_D]
        else:
            frame, line_h, line_w = inside // (BLOCK_H * BLOCK_W), inside // BLOCK_W % BLOCK_H, inside % BLOCK_W
            offset = (frame * video_h + line_h) * video_w + line_w
            if HAS_CONTEXT:
                offset = tl.where(in_context, inside, offset)
            first = start.to(tl.int64)
            k = _rows(key_base + first * key_s, offset * key_s, exists, dim, HEAD_DIM, BLOCK_D)  # [K_N, BLOCK_D]
            v = _rows(value_base + first * value_s, offset * value_s, exists, dim, HEAD_DIM, BLOCK_D)  # [K_N, BLOCK_D]
        highest, total, acc = _step(q, k, v, highest, total, acc, scale, bias, PRECISION)

    # Partial tiles, in groups of 16 keys; for context queries, the rows that the loop above left over.
    if tail is not None or HAS_CONTEXT:
        walked = full_tiles * TILE
        listed_keys = groups * GROUP
        keys_left = listed_keys
        if HAS_CONTEXT:
            listed_keys = tl.where(in_context, 0, listed_keys)
            keys_left = tl.where(in_context, video_tokens - walked, listed_keys)
        for first in tl.range(0, keys_left, BLOCK_N, num_stages=1):
            inside = first + column
            exists = inside < keys_left
            offset = walked + inside
            if tail is not None:
                from_list = inside < listed_keys
                entry = tail + (line * tail_width + inside // GROUP) * 2
                start = tl.load(entry, from_list, other=0)
                shape = tl.load(entry + 1, from_list, other=0)
                member = inside % GROUP
                if TILED:
                    listed = start + member
                else:
                    member += (shape >> 24) * GROUP
                    listed = start + slot_offset(
                        member, tl.maximum((shape >> 8) & 255, 1), tl.maximum((shape >> 16) & 255, 1), video_h, video_w
                    )
                there = inside % GROUP < (shape & 255)
                if HAS_CONTEXT:
                    exists &= (inside >= listed_keys) | there
                    offset = tl.where(in_context, offset, listed)
                else:
                    exists &= there
                    offset = listed
            offset = offset.to(tl.int64)
            k = _rows(key_base, offset * (HEAD_DIM if TILED else key_s), exists, dim, HEAD_DIM, BLOCK_D)
            v = _rows(value_base, offset * (HEAD_DIM if TILED else value_s), exists, dim, HEAD_DIM, BLOCK_D)
            bias = tl.where(exists, 0.0, float("-inf"))
            highest, total, acc = _step(q, k, v, highest, total, acc, scale, bias, PRECISION)

    # Merge: one pooled key and value for each tile that is not kept, as heavy as the tile is large.
    if proxies is not None:
        pooled = num_tiles
        if HAS_CONTEXT:
            pooled = tl.where(in_context, 0, num_tiles)
        mean_key = proxies + place * num_tiles * HEAD_DIM
        mean_value = mean_key + batch_heads.to(tl.int64) * num_tiles * HEAD_DIM
        for first in tl.range(0, pooled, BLOCK_N, num_stages=STAGES):
            index = first + column
            exists = index < num_tiles
            word = tl.load(kept + line * kept_width + index // 32, exists, other=-1)
            exists &= ((word >> (index % 32)) & 1) == 0
            bias = tl.load(log_size + index, exists, other=float("-inf"))
            k = _rows(mean_key, index * HEAD_DIM, exists, dim, HEAD_DIM, BLOCK_D)
            v = _rows(mean_value, index * HEAD_DIM, exists, dim, HEAD_DIM, BLOCK_D)
            highest, total, acc = _step(q, k, v, highest, total, acc, scale, bias, PRECISION)

    # Context keys.
    if HAS_CONTEXT:
        for first in tl.range(0, context_tokens, BLOCK_N, num_stages=1):
            index = first + column
            exists = index < context_tokens
            valid = exists
            if context_mask is not None:
                valid &= tl.load(context_mask + item * context_tokens + index, exists, other=0) != 0
            offset = tl.where(index < tokens_before, index, index + video_tokens).to(tl.int64)
            k = _rows(key, offset * key_s, valid, dim, HEAD_DIM, BLOCK_D)
            v = _rows(value, offset * value_s, valid, dim, HEAD_DIM, BLOCK_D)
            bias = tl.where(valid, 0.0, float("-inf"))
            highest, total, acc = _step(q, k, v, highest, total, acc, scale, bias, PRECISION)

    acc = acc / total[:, None]
    if coarse is not None:
        width = HEAD_DIM
        if HAS_CONTEXT:
            width = tl.where(in_context, 0, HEAD_DIM)
        spread = tl.load(coarse + line * HEAD_DIM + dim, dim < width, other=0.0)[None, :]
        if gate is not None:
            at_gate = gate + item * gate_b + head * gate_h + tokens[:, None] * gate_s + dim[None, :]
            spread = spread * tl.load(at_gate, dim_mask, other=0.0).to(tl.float32)  # [M, BLOCK_D]
        acc += spread
    at_output = output + item * output_b + head * output_h + tokens[:, None] * output_s + dim[None, :]
    tl.store(at_output, acc.to(output.dtype.element_ty), dim_mask)
    length = video_tokens + context_tokens
    tl.store(lse + item * lse_b + head * length + tokens, (highest + tl.math.log2(total)) * LN2, row_mask)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gate: torch.Tensor | None,
    context_mask: torch.Tensor | None,
    pooled: Pooled,
    lists: Lists,
    output: torch.Tensor,
    lse: torch.Tensor,
    problem: Problem,
    launch: Launch,
) -> None:
    """Write `output` `[B, S, H, D]` and `lse` fp32 `[B, H, S]` (natural logarithm) for the heads given."""
    batch, _, heads, dim = query.shape
    grid = problem.grid
    context = problem.before + problem.after
    block_m = power_of_two(grid.tile_capacity)
    block_n = max(16, min(launch.keys, block_m))
    block_d = power_of_two(dim)
    rows = (None, None) if pooled.rows is None else pooled.rows.unbind(0)
    descriptors = (None, None)
    if launch.layout == "descriptor":
        from triton.tools.tensor_descriptor import TensorDescriptor

        descriptors = tuple(TensorDescriptor.from_tensor(x, [1, block_n, block_d]) for x in rows)
    programs = (grid.num_tiles + -(-context // block_m)) * batch * heads
    attend_kernel[(programs,)](
        query,
        key,
        value,
        *rows,
        *descriptors,
        lists.starts,
        lists.tail,
        lists.counts,
        lists.kept,
        pooled.proxies,
        pooled.log_size,
        lists.coarse,
        gate,
        context_mask,
        output,
        lse,
        problem.scale * math.log2(math.e),
        *query.stride()[:3],
        *key.stride()[:3],
        *value.stride()[:3],
        *(query if gate is None else gate).stride()[:3],
        *output.stride()[:3],
        lse.stride(0),
        heads,
        batch * heads,
        grid.num_tiles,
        problem.top_k,
        0 if lists.tail is None else lists.tail.shape[3],
        0 if lists.kept is None else lists.kept.shape[3],
        problem.before,
        problem.after,
        *grid.video_shape,
        *grid.tiles_per_axis[1:],
        *grid.block_size,
        HEAD_DIM=dim,
        BLOCK_D=block_d,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        GROUP=GROUP,
        STAGES=launch.stages,
        PRECISION="ieee",
        HAS_CONTEXT=context > 0,
        num_warps=launch.warps,
        num_stages=launch.stages,
        **({} if launch.registers is None else {"maxnreg": launch.registers}),
    )
