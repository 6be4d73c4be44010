"""The exact top-k of every query tile, and the lists that follow from it, with bounded memory.

`coarse.py` or `quarter_scores.py` write the scores of some query tiles to a workspace. `top_k_kernel` takes a row of
it, finds the k-th highest score, and writes which tiles are kept and, from these, the lists that the sparse kernel
walks. Where all scores do not fit into the workspace, the two take turns.

Shapes: B batch, H heads of this pass, N tiles, D head_dim, K kept tiles.
"""

from __future__ import annotations

import functools
from statistics import NormalDist

import torch
import triton
import triton.language as tl

from ...problem import Problem
from ..arguments import group_constants, partial_width
from ..buffers import PooledTiles, SelectedTiles
from ..plans import Plan
from ..primitives.geometry import SIZES, SLICED, workspace_width
from ..primitives.tile_lists import write_lists
from ..recording import Launcher
from .coarse import coarse_attention
from .quarter_scores import quarter_scores

MAX_TILES = 16384
LEAST, MOST = tl.constexpr(-(2**31)), tl.constexpr(2**31 - 1)
MAX_INTERPOLATIONS = tl.constexpr(8)  # counts of a row's values before its search goes by halves, too


@triton.jit
def _in_order(bits):
    """Integers that order as the floats with these bits do, and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _ordered(scores, valid):
    """Integers that order as the scores do; columns beyond the last tile come below them all."""
    return tl.where(valid, _in_order(scores.to(tl.int32, bitcast=True)), LEAST)


@triton.jit
def _float_of(number):
    """The float that `_in_order` makes this integer of."""
    return _in_order(number).to(tl.float32, bitcast=True)


@triton.jit
def _threshold(scores, ordered, valid, num_tiles, top_k, quantile, spacing):
    """Of a row of scores and what `_ordered` makes of it: the number that `top_k` values reach, or, where values are
    alike, the highest that more reach; and how many reach it.

    A search between a number that enough values reach and one that too few do. Were the scores of a normal
    distribution, `top_k` would lie above `quantile` standard deviations, and those around it `spacing` deviations
    apart: that is where it begins. It goes on where a line through both ends says, and in the end, for rows that
    defy this, to the middle of the integers every other time.
    """
    mean = tl.sum(tl.where(valid, scores, 0.0), 0) / num_tiles
    square = tl.sum(tl.where(valid, scores * scores, 0.0), 0) / num_tiles
    deviation = tl.sqrt(tl.maximum(square - mean * mean, 0.0))
    guess = mean + quantile * deviation
    stride = spacing * deviation
    low = tl.full((), LEAST, tl.int32)
    high = tl.full((), MOST, tl.int32)
    low_count = num_tiles
    high_count = 0
    turn = 0
    while (low_count != top_k) & (low + 1 < high):
        candidate = _in_order(guess.to(tl.int32, bitcast=True))
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        astray = (candidate <= low) | (candidate >= high) | ((turn >= MAX_INTERPOLATIONS) & (turn % 2 == 0))
        candidate = tl.where(astray, middle, candidate)
        count = tl.sum((ordered >= candidate).to(tl.int32), 0)
        enough = count >= top_k
        low = tl.where(enough, candidate, low)
        low_count = tl.where(enough, count, low_count)
        high = tl.where(enough, high, candidate)
        high_count = tl.where(enough, high_count, count)
        surplus = (count - top_k).to(tl.float32)
        beyond = _float_of(candidate) + stride * (surplus + tl.where(enough, 1.0, -1.0))
        stride *= 1.5
        share = (low_count - top_k).to(tl.float32) / (low_count - high_count).to(tl.float32)
        between = _float_of(low) + (_float_of(high) - _float_of(low)) * share
        guess = tl.where((low == LEAST) | (high == MOST), beyond, between)
        turn += 1
    return low, low_count


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=SLICED)
def top_k_kernel(
    scores,
    max_norm,
    boxes,
    indices,
    full_tile_starts,
    partial_groups,
    list_lengths,
    selected_bits,
    max_key_norm,
    chunk_counters,
    first_row,
    heads,
    batch_heads,
    num_tiles,
    top_k,
    quantile,
    spacing,
    partial_width,
    indices_b,
    BLOCK: tl.constexpr,
    PADDED_TO: tl.constexpr,
    KEYS: tl.constexpr,
    CHUNK: tl.constexpr,
    LIST_CHUNK: tl.constexpr,
    TILED: tl.constexpr,
    MAX_GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Program (row of the workspace). Rows of all heads are counted with each head's last block full."""
    padded = tl.cdiv(num_tiles, PADDED_TO) * PADDED_TO
    workspace_row = first_row + tl.program_id(0)
    query_tile = workspace_row % padded
    if query_tile >= num_tiles:
        return
    scores += tl.program_id(0).to(tl.int64) * workspace_width(num_tiles)
    key = tl.arange(0, KEYS)
    whole_row = tl.load(scores + key, key < num_tiles, other=0.0)
    ordered = _ordered(whole_row, key < num_tiles)
    threshold, reached = _threshold(whole_row, ordered, key < num_tiles, num_tiles, top_k, quantile, spacing)
    missing = 0
    if reached > top_k:
        missing = top_k - tl.sum((ordered > threshold).to(tl.int32), 0)

    batch_head = (workspace_row // padded).to(tl.int64)
    row = batch_head * num_tiles + query_tile
    indices += (batch_head // heads) * indices_b + ((batch_head % heads) * num_tiles + query_tile) * top_k
    level_before = 0
    kept_before = tl.zeros((1,), tl.int32)
    for begin in range(0, num_tiles, CHUNK):
        column = (begin + tl.arange(0, CHUNK))[None, :]  # a second axis makes Triton leave neighbours to one thread
        exists = column < num_tiles
        values = _ordered(tl.load(scores + column, exists, other=0.0), exists)
        kept = exists & (values >= threshold)
        if reached > top_k:
            # Of equal scores, those further left are kept.
            alike = (exists & (values == threshold)).to(tl.int32)
            rank = level_before + tl.cumsum(alike, 1)
            kept = kept & ((alike == 0) | (rank <= missing))
            level_before += tl.sum(alike)
        if selected_bits is not None:
            bits = tl.reshape(kept.to(tl.int32), (CHUNK // 32, 32)) << tl.arange(0, 32)[None, :]
            word = begin // 32 + tl.arange(0, CHUNK // 32)
            tl.store(selected_bits + row * (KEYS // 32) + word, tl.sum(bits, 1), word < KEYS // 32)
        count = kept.to(tl.int32)
        index = kept_before[:, None] + tl.cumsum(count, 1) - count
        tl.store(indices + index, column, kept)
        kept_before += tl.sum(count, 1)
    tl.debug_barrier()  # what one thread has stored others load
    write_lists(
        indices,
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
        LIST_CHUNK,
    )
    tl.store(chunk_counters + row, 0)
    if query_tile == 0:  # whoever has a head's first tile also finds its longest key
        tile = tl.arange(0, KEYS)
        norm = tl.load(max_norm + (batch_heads + batch_head) * num_tiles + tile, tile < num_tiles, other=0.0)
        tl.store(max_key_norm + batch_head, tl.max(norm, 0))


@functools.lru_cache(maxsize=256)
def _expectation(num_tiles: int, top_k: int) -> tuple[float, float]:
    """In standard deviations: above which number `top_k` of so many normally distributed values lie, and how far apart
    two of them are there."""
    if top_k == num_tiles:
        return 0.0, 0.0  # nothing is searched for
    normal = NormalDist()
    quantile = normal.inv_cdf(1 - top_k / num_tiles)
    return quantile, 1 / (num_tiles * normal.pdf(quantile))


def select_tiles(
    launcher: Launcher, pooled: PooledTiles, indices: torch.Tensor, problem: Problem, plan: Plan
) -> SelectedTiles:
    """Fill `indices` int32 `[B, H, N, K]`, ascending, and return what the sparse kernel walks."""
    means, quarters = pooled.means, pooled.quarters
    _, batch, heads, num_tiles, dim = means.shape
    grid, top_k = problem.grid, problem.top_k
    width = partial_width(problem)
    per_tile = (batch, heads, num_tiles)
    words = plan.top_k.keys // 32
    selected = SelectedTiles(
        full_tile_starts=launcher.empty(indices, (*per_tile, top_k)),
        partial_groups=launcher.empty(indices, (*per_tile, width), torch.int64) if width else None,
        list_lengths=launcher.empty(indices, (*per_tile, 2)) if width else None,
        selected_bits=launcher.empty(indices, (*per_tile, words)) if problem.has_pooled_keys else None,
        coarse=launcher.empty(means, (*per_tile, dim)) if problem.has_coarse else None,
        max_key_norm=launcher.empty(means, (batch, heads)),
        chunk_counters=launcher.empty(indices, per_tile),
    )
    block = plan.scores.block_m
    all_rows = batch * heads * -(-num_tiles // block) * block
    row_bytes = 4 * (-(-num_tiles // 32) * 32)
    at_once = min(all_rows, max(block, plan.workspace_bytes // (row_bytes * block) * block))
    scores = launcher.empty(means, (at_once, row_bytes // 4))
    for first_row in range(0, all_rows, at_once):
        rows = min(at_once, all_rows - first_row)
        if problem.has_coarse or quarters is None:
            coarse_attention(
                launcher,
                means,
                scores if quarters is None else None,
                selected.coarse,
                None,
                problem.scale,
                plan.scores,
                plan.precision,
                slice(first_row, first_row + rows),
            )
        if quarters is not None:
            quarter_scores(
                launcher,
                pooled,
                scores,
                first_row,
                rows,
                problem.scale,
                plan.quarter_scores,
                padded_to=block,
                precision=plan.precision,
            )
        launcher.launch(
            top_k_kernel,
            (rows,),
            scores,
            pooled.max_norm,
            pooled.boxes,
            indices,
            selected.full_tile_starts,
            selected.partial_groups,
            selected.list_lengths,
            selected.selected_bits,
            selected.max_key_norm,
            selected.chunk_counters,
            first_row,
            heads,
            batch * heads,
            num_tiles,
            top_k,
            *_expectation(num_tiles, top_k),
            width,
            indices.stride(0),
            BLOCK=grid.block_size,
            PADDED_TO=block,
            KEYS=plan.top_k.keys,
            CHUNK=plan.top_k.chunk,
            LIST_CHUNK=plan.top_k.list_chunk,
            TILED=plan.sparse.reads_copy,
            **group_constants(grid),
            num_warps=plan.top_k.warps,
        )
    return selected
