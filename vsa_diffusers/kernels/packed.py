"""The coarse branch of a packed sequence (FastH3): means of its tiles, and gate times coarse added to every row.

`vsa_diffusers/coarse.py` has the definition, in PyTorch. What is between the two kernels, attention among a few hundred
means, is PyTorch's there and here.

Shapes: B batch, S rows, H heads, D head_dim, N tiles of at most C rows.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from ..tiles import TileGrid
from .arguments import power_of_two
from .recording import STATED

ROWS = 16  # of a program that adds; head_dim makes each 256 bytes


@triton.jit(do_not_specialize=["batch_heads", "heads"])
def tile_means_kernel(
    x,
    tiles,
    means,
    x_b,
    x_s,
    x_h,
    batch_heads,
    heads,
    CAPACITY: tl.constexpr,
    BLOCK_C: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Mean of one tile of one head. Programs that run together have a tile's heads, whose rows lie side by side."""
    tile = tl.program_id(0) // batch_heads
    batch_head = tl.program_id(0) - tile * batch_heads
    batch = (batch_head // heads).to(tl.int64)
    head = (batch_head % heads).to(tl.int64)
    slot = tl.arange(0, BLOCK_C)
    dim = tl.arange(0, BLOCK_D)
    row = tl.load(tiles + tile * CAPACITY + slot, slot < CAPACITY, other=-1).to(tl.int64)  # [C]
    x += batch * x_b + head * x_h
    there = (row >= 0)[:, None] & (dim < HEAD_DIM)[None, :]
    rows = tl.load(x + row[:, None] * x_s + dim[None, :], there, other=0.0).to(tl.float32)  # [C, D]
    mean = tl.sum(rows, 0) / tl.sum((row >= 0).to(tl.float32), 0)
    tl.store(means + (tile.to(tl.int64) * batch_heads + batch_head) * HEAD_DIM + dim, mean, dim < HEAD_DIM)


@triton.jit(do_not_specialize=["length", "batch_heads", "heads"])
def add_gated_kernel(
    exact,
    gate,
    coarse,
    tile_of_row,
    out,
    exact_b,
    exact_s,
    exact_h,
    gate_b,
    gate_s,
    gate_h,
    coarse_bh,
    coarse_n,
    length,
    batch_heads,
    heads,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """`exact + gate * coarse` of some rows of one head, each with the coarse output of its tile."""
    block = tl.program_id(0) // batch_heads
    batch_head = (tl.program_id(0) - block * batch_heads).to(tl.int64)
    batch = batch_head // heads
    head = batch_head % heads
    row = block * ROWS + tl.arange(0, ROWS)
    dim = tl.arange(0, BLOCK_D)
    there = (row < length)[:, None] & (dim < HEAD_DIM)[None, :]
    tile = tl.load(tile_of_row + row, row < length, other=0).to(tl.int64)
    coarse += batch_head * coarse_bh
    spread = tl.load(coarse + tile[:, None] * coarse_n + dim[None, :], there, other=0.0).to(tl.float32)  # [ROWS, D]
    row = row.to(tl.int64)
    exact += batch * exact_b + head * exact_h
    gate += batch * gate_b + head * gate_h
    x = tl.load(exact + row[:, None] * exact_s + dim[None, :], there, other=0.0).to(tl.float32)
    weight = tl.load(gate + row[:, None] * gate_s + dim[None, :], there, other=0.0).to(tl.float32)
    out += ((batch * length + row[:, None]) * heads + head) * HEAD_DIM + dim[None, :]
    tl.store(out, (x + weight * spread).to(out.dtype.element_ty), there)


def add_packed_coarse(
    exact: torch.Tensor,
    gate: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Sequence[int],
    video_shape: Sequence[int],
    block_size: Sequence[int],
    scale: float | None = None,
) -> torch.Tensor:
    """`exact + gate * packed_coarse(query, key, value, ...)`, `[B, S, H, D]` all, without gradients."""
    tiles, tile_of_row = tables(tuple(segments), tuple(video_shape), tuple(block_size), query.device)
    means = [tile_means(x, tiles) for x in (query, key, value)]
    coarse = F.scaled_dot_product_attention(*means, scale=scale).to(exact.dtype)
    return add_gated(exact, gate, coarse, tile_of_row)


def tile_means(x: torch.Tensor, tiles: torch.Tensor) -> torch.Tensor:
    """Means of tiles in fp32, `[B, H, N, D]`, of `[B, S, H, D]`; `tiles` as `tables` has them."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    batch, _, heads, head_dim = x.shape
    count, capacity = tiles.shape
    means = x.new_empty((count, batch, heads, head_dim), dtype=torch.float32)
    form = dict(CAPACITY=capacity, BLOCK_C=power_of_two(capacity), HEAD_DIM=head_dim, BLOCK_D=power_of_two(head_dim))
    with torch.cuda.device_of(x):
        tile_means_kernel[(count * batch * heads,)](
            x, tiles, means, *x.stride()[:3], batch * heads, heads, **form, num_warps=4, **STATED
        )
    return means.permute(1, 2, 0, 3)


def add_gated(exact: torch.Tensor, gate: torch.Tensor, coarse: torch.Tensor, tile_of_row: torch.Tensor) -> torch.Tensor:
    """`exact + gate * coarse[tile_of_row]` of `[B, S, H, D]` twice and `[B, H, N, D]`, in a tensor of its own."""
    exact, gate, coarse = (x if x.stride(-1) == 1 else x.contiguous() for x in (exact, gate, coarse))
    batch, length, heads, head_dim = exact.shape
    coarse = coarse.flatten(0, 1)
    out = torch.empty_like(exact, memory_format=torch.contiguous_format)
    with torch.cuda.device_of(exact):
        add_gated_kernel[(-(-length // ROWS) * batch * heads,)](
            exact,
            gate,
            coarse,
            tile_of_row,
            out,
            *exact.stride()[:3],
            *gate.stride()[:3],
            *coarse.stride()[:2],
            length,
            batch * heads,
            heads,
            ROWS=ROWS,
            HEAD_DIM=head_dim,
            BLOCK_D=power_of_two(head_dim),
            num_warps=4,
            **STATED,
        )
    return out


@functools.lru_cache(maxsize=8)
def tables(
    segments: tuple[int, ...],
    video_shape: tuple[int, int, int],
    block_size: tuple[int, int, int],
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which rows each tile has, int32 `[N, C]`, -1 where it has fewer; and the tile of each row, int32 `[S]`."""
    capacity, start = math.prod(block_size), 0
    parts = []
    for length in segments:
        rows = torch.arange(-(-length // capacity) * capacity, device=device).unflatten(0, (-1, capacity))
        parts.append(torch.where(rows < length, rows + start, -1))
        start += length
    rows = TileGrid(video_shape, block_size).token_index(device)
    tiles = torch.cat([*parts, torch.where(rows >= 0, rows + start, -1)])
    length = start + math.prod(video_shape)
    number = torch.arange(len(tiles), dtype=torch.int32, device=device)[:, None].expand_as(tiles)
    tile_of_row = torch.empty(length + 1, dtype=torch.int32, device=device)  # and a place for rows that are not there
    tile_of_row[torch.where(tiles >= 0, tiles, length)] = number
    return tiles.int(), tile_of_row[:length]
