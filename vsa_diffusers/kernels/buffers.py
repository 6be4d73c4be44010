"""What the kernels of a call hand one another.

Shapes: B batch, H heads of this pass, P = B * H, S sequence, N tiles, V video tokens, D head_dim, K kept tiles,
G groups of partial tiles, W = ceil(N / 32) words.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class PooledTiles(NamedTuple):
    """What the pass leaves behind; `None` where nobody asked for it."""

    means: torch.Tensor  # fp32 [query and key (and value), B, H, N, D]
    pooled_kv: torch.Tensor | None  # key and value means in the dtype of the inputs, [2, B, H, N, D]
    rows: torch.Tensor | None  # key and value in tile order, [2, B * H, V, D]
    log_size: torch.Tensor | None  # log2 of the tile sizes, fp32 [N rounded up to 64], undefined beyond the last tile
    max_norm: torch.Tensor  # norm of the longest row of each tile, fp32 [query and key, B, H, N]
    quarters: torch.Tensor | None  # means of their quarters in the dtype of the inputs, [query and key, B, H, N, 4, D]
    log_counts: torch.Tensor | None  # logarithm of the tokens in each quarter, fp32 [N, 4]
    boxes: torch.Tensor  # first row (or token) of every tile, and its extents, as in `store_box`, int64 [N]


class SelectedTiles(NamedTuple):
    """What the sparse kernel walks, per head and query tile."""

    full_tile_starts: torch.Tensor  # first row (or token) of every full tile kept, int32 [B, H, N, K]
    partial_groups: torch.Tensor | None  # every group of the partial tiles kept, as in `lists.py`, int64 [B, H, N, G]
    list_lengths: torch.Tensor | None  # full tiles, groups: int32 [B, H, N, 2]
    selected_bits: torch.Tensor | None  # one bit per tile: int32 [B, H, N, words]
    coarse: torch.Tensor | None  # fp32 [B, H, N, D]
    max_key_norm: torch.Tensor  # norm of the longest key, fp32 [B, H]
    chunk_counters: torch.Tensor  # zeros, where programs that keep in step count themselves: int32 [B, H, N]


class QueryLists(NamedTuple):
    """Per head and query tile: the tiles it keeps."""

    full_tile_starts: torch.Tensor  # first row (or token) of every full tile kept, int32 [P, N, K]
    partial_groups: torch.Tensor | None  # every group of the partial tiles kept, as in `lists.py`, int64 [P, N, any]
    list_lengths: torch.Tensor  # full tiles, groups: int32 [P, N, 2]
    selected_bits: torch.Tensor  # bit k % 32 of word k // 32 says whether key tile k is kept: int32 [P, W, N]


class KeyLists(NamedTuple):
    """Per head and key tile: the query tiles that keep it."""

    full_tile_starts: torch.Tensor  # first row (or token) of every full one, int32 [P, K * full tiles]
    partial_groups: torch.Tensor | None  # every group of the partial ones, as in `lists.py`, int64 [P, K * groups]
    list_lengths: torch.Tensor  # full tiles, groups: int32 [P, N, 2]
    offsets: torch.Tensor  # where the two lists of a key tile begin: int32 [P, N, 2]
    order: torch.Tensor  # key tiles, those with the longest lists first: int32 [P, N]


class Preprocessed(NamedTuple):
    """What the pass leaves behind; `None` where nobody asked for it."""

    lse_and_delta: torch.Tensor  # log-sum-exp (base 2) and delta by position, fp32 [2, P, S]
    rows: torch.Tensor | None  # query and gradient in tile order, [2, P, V, D]
    grad_coarse: torch.Tensor | None  # gradient of the coarse output, fp32 [P, N, D]
    coarse_delta: torch.Tensor | None  # the product of that and the coarse output, fp32 [P, N]
