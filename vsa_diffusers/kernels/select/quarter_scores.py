"""Scores from quarters of the tiles, for `selection="quarters"`; `vsa_diffusers/selection.py` states what they are.

The pool pass makes the means of the quarters. `quarter_scores_kernel` fills the workspace that `top_k_kernel` reads.

Shapes: B batch, H heads of this pass, N tiles, D head_dim, M query tiles of a program, R = 4 * M quarters, L key tiles.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..arguments import power_of_two
from ..buffers import PooledTiles
from ..plans import BlockLaunch
from ..primitives.geometry import SIZES, workspace_width
from ..recording import Launcher


@triton.jit(do_not_specialize=SIZES)
def quarter_scores_kernel(
    quarters,
    log_counts,
    scores,
    first_row,
    batch_heads,
    num_tiles,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PADDED_TO: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (`TILES` query tiles): as many rows of the workspace `[rows, width]`, from row `first_row` of all.

    Rows of all heads are counted with each head's last block of `PADDED_TO` rows full.
    """
    padded = tl.cdiv(num_tiles, PADDED_TO) * PADDED_TO
    first = first_row + tl.program_id(0) * TILES
    batch_head = (first // padded).to(tl.int64)
    tile = first % padded
    if tile >= num_tiles:
        return
    dim = tl.arange(0, BLOCK_D)
    quarter_query = quarters + batch_head * num_tiles * (4 * HEAD_DIM)
    quarter_key = quarter_query + batch_heads.to(tl.int64) * num_tiles * (4 * HEAD_DIM)
    row = 4 * tile + tl.arange(0, 4 * TILES)
    own_mask = (row[:, None] < 4 * num_tiles) & (dim[None, :] < HEAD_DIM)
    q = tl.load(quarter_query + row[:, None] * HEAD_DIM + dim[None, :], own_mask, other=0.0)  # [R, D]
    own = tl.load(log_counts + row, row < 4 * num_tiles, other=0.0)
    lane = tl.program_id(0).to(tl.int64) * TILES + tl.arange(0, TILES)
    highest = tl.full((4 * TILES, BLOCK_N), float("-inf"), tl.float32)
    # One loop over key tiles and their quarters, so that loads run ahead across both.
    for step in range(0, 4 * tl.cdiv(num_tiles, BLOCK_N)):
        part = step % 4
        column = step // 4 * BLOCK_N + tl.arange(0, BLOCK_N)
        mask = (column[:, None] < num_tiles) & (dim[None, :] < HEAD_DIM)
        k = tl.load(quarter_key + (4 * column + part)[:, None] * HEAD_DIM + dim[None, :], mask, other=0.0)  # [L, D]
        log_count = tl.load(log_counts + 4 * column + part, column < num_tiles, other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale + log_count[None, :]
        highest = tl.maximum(tl.where(part == 0, float("-inf"), highest), s)
        if part == 3:
            best = tl.max(tl.reshape(highest + own[:, None], (TILES, 4, BLOCK_N)), 1)  # [M, L]
            offset = lane[:, None] * workspace_width(num_tiles) + column[None, :]
            tl.store(scores + offset, best, column[None, :] < num_tiles)


def quarter_scores(
    launcher: Launcher,
    pooled: PooledTiles,
    scores: torch.Tensor,
    first_row: int,
    rows: int,
    scale: float,
    launch: BlockLaunch,
    *,
    padded_to: int,
    precision: str,
) -> None:
    """Fill `rows` rows of the workspace `scores` `[rows, width]`.

    Args:
        pooled: what the pool pass left behind.
        first_row: of all rows; they are counted with each head's last block of `padded_to` rows full.
        precision: of the products where the inputs are 32 bits wide.
    """
    assert pooled.quarters is not None
    _, batch, heads, num_tiles, _, dim = pooled.quarters.shape
    launcher.launch(
        quarter_scores_kernel,
        (rows // launch.block_m,),
        pooled.quarters,
        pooled.log_counts,
        scores,
        first_row,
        batch * heads,
        num_tiles,
        scale,
        HEAD_DIM=dim,
        BLOCK_D=power_of_two(dim),
        PADDED_TO=padded_to,
        BLOCK_N=launch.block_n,
        TILES=launch.block_m,
        PRECISION=precision,
        **launch.options,
    )
