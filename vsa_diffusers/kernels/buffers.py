"""What the kernels of a call hand one another.

Shapes: B batch, H heads of this pass, P = B * H, S sequence, N tiles, V video tokens, D head_dim, K kept tiles,
G groups of partial tiles, W = ceil(N / 32) words.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .recording import Launcher


class ForwardTensors(NamedTuple):
    """The tensors of a forward call, or of some of its heads; `None` for what was not given or is not wanted."""

    query: torch.Tensor  # [B, S, H, D], as are the next four
    key: torch.Tensor
    value: torch.Tensor
    gate: torch.Tensor | None
    output: torch.Tensor
    indices: torch.Tensor | None  # kept tiles, ascending, int32 [B, H, N, K]
    lse: torch.Tensor | None  # log-sum-exp (natural logarithm), fp32 [B, H, S]
    context_mask: torch.Tensor | None  # not 0 where a context key is valid, int32 [B, context tokens]

    def of_heads(self, launcher: Launcher, heads: slice) -> ForwardTensors:
        """The same for some of the heads."""
        per_head = (*launcher.slices(self[:5], 2, heads), *launcher.slices(self[5:7], 1, heads))
        return ForwardTensors._make((*per_head, self.context_mask))

    def of_video(self, launcher: Launcher, video: slice) -> ForwardTensors:
        """The same for some of the tokens; `indices` name the video's tiles as they are."""
        (lse,) = launcher.slices((self.lse,), 2, video)
        return ForwardTensors._make((*launcher.slices(self[:5], 1, video), self.indices, lse, self.context_mask))


class BackwardTensors(NamedTuple):
    """The tensors of a backward call, or of some of its heads."""

    query: torch.Tensor  # [B, S, H, D], as are the next nine
    key: torch.Tensor
    value: torch.Tensor
    gate: torch.Tensor | None
    output: torch.Tensor
    grad_output: torch.Tensor
    grad_query: torch.Tensor
    grad_key: torch.Tensor
    grad_value: torch.Tensor
    grad_gate: torch.Tensor | None
    indices: torch.Tensor  # the last three as in `ForwardTensors`
    lse: torch.Tensor
    context_mask: torch.Tensor | None

    def of_heads(self, launcher: Launcher, heads: slice) -> BackwardTensors:
        """The same for some of the heads."""
        per_head = (*launcher.slices(self[:10], 2, heads), *launcher.slices(self[10:12], 1, heads))
        return BackwardTensors._make((*per_head, self.context_mask))


class PooledTiles(NamedTuple):
    """What the pool pass leaves behind; `None` where nobody asked for it."""

    means: torch.Tensor  # fp32 [query and key (and value), B, H, N, D]
    pooled_kv: torch.Tensor | None  # key and value means in the dtype of the inputs, [2, B, H, N, D]
    rows: torch.Tensor | None  # key and value in tile order, [2, B * H, V, D]
    log_size: torch.Tensor | None  # log2 of the tile sizes, fp32 [N rounded up to 64], undefined beyond the last tile
    max_norm: torch.Tensor  # norm of the longest row of each tile, fp32 [query and key, B, H, N]
    quarters: torch.Tensor | None  # means of their quarters in the dtype of the inputs, [query and key, B, H, N, 4, D]
    log_counts: torch.Tensor | None  # logarithm of the tokens in each quarter, fp32 [N, 4]
    boxes: torch.Tensor  # first row (or token) of every tile, and its extents, as in `store_box`, int64 [N]


class SelectedTiles(NamedTuple):
    """What the sparse kernel walks, per head and query tile, and the coarse output."""

    full_tile_starts: torch.Tensor  # first row (or token) of every full tile kept, int32 [B, H, N, K]
    partial_groups: torch.Tensor | None  # the groups of the partial tiles kept (`tile_lists.py`), int64 [B, H, N, G]
    list_lengths: torch.Tensor | None  # full tiles, groups: int32 [B, H, N, 2]
    selected_bits: torch.Tensor | None  # one bit per tile: int32 [B, H, N, words]
    coarse: torch.Tensor | None  # fp32 [B, H, N, D]
    max_key_norm: torch.Tensor  # norm of the longest key, fp32 [B, H]
    chunk_counters: torch.Tensor  # zeros; programs that synchronise count themselves there, int32 [B, H, N]


class QueryLists(NamedTuple):
    """Per head and query tile: the tiles it keeps."""

    full_tile_starts: torch.Tensor  # first row (or token) of every full tile kept, int32 [P, N, K]
    partial_groups: torch.Tensor | None  # the groups of the partial tiles kept (`tile_lists.py`), int64 [P, N, any]
    list_lengths: torch.Tensor  # full tiles, groups: int32 [P, N, 2]
    selected_bits: torch.Tensor  # bit k % 32 of word k // 32 says whether key tile k is kept: int32 [P, W, N]


class KeyLists(NamedTuple):
    """Per head and key tile: the query tiles that keep it."""

    full_tile_starts: torch.Tensor  # first row (or token) of every full one, int32 [P, K * full tiles]
    partial_groups: torch.Tensor | None  # the groups of the partial ones (`tile_lists.py`), int64 [P, K * groups]
    list_lengths: torch.Tensor  # full tiles, groups: int32 [P, N, 2]
    offsets: torch.Tensor  # where the two lists of a key tile begin: int32 [P, N, 2]
    order: torch.Tensor  # key tiles, those with the longest lists first: int32 [P, N]


class Preprocessed(NamedTuple):
    """What `backward_preprocess` leaves behind; `None` where nobody asked for it."""

    lse_and_delta: torch.Tensor  # log-sum-exp (base 2) and delta by position, fp32 [2, P, S]
    rows: torch.Tensor | None  # query and gradient in tile order, [2, P, V, D]
    grad_coarse: torch.Tensor | None  # gradient of the coarse output, fp32 [P, N, D]
    coarse_delta: torch.Tensor | None  # the product of that and the coarse output, fp32 [P, N]
