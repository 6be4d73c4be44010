"""Which key tiles a query tile keeps: the `top_k` of highest score, by one of two kinds of scores.

`"mean"`: the logit between the tiles' means. `"quarters"`: the highest logit between the mean of a quarter of the query
tile and that of a quarter of the key tile. Quarters are 2 x 2 parts of a tile along h and w, split after `ceil(h / 2)`
and `ceil(w / 2)` tokens of the block; in partial tiles some hold fewer tokens than others, or none.

Shapes: B batch, H heads, N tiles, C tile capacity, D head_dim, c query tiles of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from .tiles import TileGrid

SELECTIONS = ("mean", "quarters")
QUARTERS = 4
MIN_CHUNK_BYTES = 2**22


def select_tiles(scores: Iterable[torch.Tensor], top_k: int) -> torch.Tensor:
    """The `top_k` key tiles with the highest score per head and query tile.

    Args:
        scores: of one chunk of query tiles after another, `[B, H, c, N]`.

    Returns:
        int32 `[B, H, N, top_k]`, ascending, so that neighbouring query tiles walk the keys together.
    """
    chunks = []
    for part in scores:
        chosen = part.topk(top_k, dim=-1, sorted=False).indices
        chunks.append(chosen.sort(dim=-1).values.to(torch.int32))
    return torch.cat(chunks, dim=2)


def mean_scores(mean_query: torch.Tensor, mean_key: torch.Tensor, scale: float) -> Iterator[torch.Tensor]:
    """Scores between tile means `[B, H, N, D]`, a chunk of query tiles at a time."""
    keys = mean_key.transpose(-1, -2)
    for part in mean_query.split(_chunk(mean_query, 1), dim=2):
        yield part @ keys * scale


def quarters(valid: torch.Tensor, grid: TileGrid) -> torch.Tensor:
    """Which slots of each tile make up its quarters, bool `[N, C, 4]`, given those that hold a token `[N, C]`."""
    _, block_h, block_w = grid.block_size
    slot = torch.arange(grid.tile_capacity, device=valid.device)
    h, w = slot // block_w % block_h, slot % block_w
    quarter = 2 * (h >= -(-block_h // 2)).long() + (w >= -(-block_w // 2)).long()
    return valid[..., None] & (quarter[:, None] == torch.arange(QUARTERS, device=valid.device))


def quarter_scores(
    query: torch.Tensor, key: torch.Tensor, counts: torch.Tensor, scale: float
) -> Iterator[torch.Tensor]:
    """The highest logit between a quarter of the query tile and one of the key tile, a chunk of query tiles at a time.

    A quarter weighs as many tokens as it has, so the logit is `scale * query . key + log(own tokens * its tokens)`: the
    largest part of what the softmax over all tokens would give to the key tile, before it is normalised.

    Args:
        query, key: means of the quarters `[B, H, N, 4, D]`; any finite number where a quarter is empty.
        counts: tokens of every quarter `[N, 4]`.

    Yields:
        `[B, H, c, N]`.
    """
    weight = counts.to(query.dtype).log()  # -inf where a quarter is empty
    keys = key.flatten(2, 3).transpose(-1, -2)
    rows = _chunk(key, 2 * QUARTERS**2)
    for part, own in zip(query.split(rows, dim=2), weight.split(rows), strict=True):
        logits = (part.flatten(2, 3) @ keys * scale).unflatten(3, (-1, QUARTERS)).add_(weight)  # [B, H, c * 4, N, 4]
        yield (logits.amax(-1) + own.flatten()[:, None]).unflatten(2, (-1, QUARTERS)).amax(3)


def _chunk(means: torch.Tensor, scores: int) -> int:
    """Query tiles whose `scores` numbers for every key tile of `means` `[B, H, N, ...]` fit the bound, or one."""
    batch, heads, num_tiles = means.shape[:3]
    return max(1, MIN_CHUNK_BYTES // (4 * scores * batch * heads * num_tiles))
