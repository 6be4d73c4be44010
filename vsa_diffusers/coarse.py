"""The coarse branch over more than the video: tiles of every segment of a packed sequence, in PyTorch.

FastH3 (https://github.com/hao-ai-lab/FastVideo) trains gates whose coarse branch covers text, keyframes and audio with
the video. Its definition is the sparse branch plus gate times this.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

Extents = tuple[Sequence[int], Sequence[int]]
"""A grid's extents and its tiles', along one axis for a segment, or three for the video."""


def packed_coarse(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Sequence[int],
    video_shape: Sequence[int],
    block_size: Sequence[int],
    scale: float | None = None,
) -> torch.Tensor:
    """Attention between the means of all tiles, given to every row of its tile.

    Each segment is cut by itself into runs of as many rows as a block has tokens, the last one shorter. All tiles are
    queries and keys alike, and none weighs more for its size. Means, scores and output are kept in fp32 (fp64).

    Args:
        query: `[batch, sequence, heads, head_dim]`.
        key: likewise.
        value: likewise.
        segments: lengths of what precedes the video in the sequence, in its order; empty ones vanish.
        video_shape: `(T, H, W)`, the grid of the video rows, which end the sequence.
        block_size: `(t, h, w)`, tokens per tile of the video.
        scale: factor on the logits; `head_dim**-0.5` if `None`.

    Returns:
        Of the shape and dtype of `query`.
    """
    run = math.prod(block_size)
    grids: list[Extents] = [((length,), (run,)) for length in segments if length]
    grids.append((tuple(video_shape), tuple(block_size)))
    rows = [math.prod(extents) for extents, _ in grids]
    means = [
        torch.cat([_means(part, *grid) for part, grid in zip(x.split(rows, 1), grids, strict=True)], 1).transpose(1, 2)
        for x in (query, key, value)
    ]
    coarse = F.scaled_dot_product_attention(*means, scale=scale).transpose(1, 2).to(query.dtype)
    tiles = [math.prod(_counts(*grid)) for grid in grids]
    return torch.cat([_spread(part, *grid) for part, grid in zip(coarse.split(tiles, 1), grids, strict=True)], 1)


def _counts(extents: Sequence[int], blocks: Sequence[int]) -> list[int]:
    """Number of tiles along each axis."""
    return [-(-extent // block) for extent, block in zip(extents, blocks, strict=True)]


def _means(x: torch.Tensor, extents: Sequence[int], blocks: Sequence[int]) -> torch.Tensor:
    """Means of the tiles of `[batch, rows, heads, head_dim]`: `[batch, tiles, heads, head_dim]`."""
    counts, axes = _counts(extents, blocks), len(extents)
    lacking = [count * block - extent for count, block, extent in zip(counts, blocks, extents, strict=True)]
    padding = [side for lack in reversed(lacking) for side in (0, lack)]
    cells = [side for pair in zip(counts, blocks, strict=True) for side in pair]
    padded = F.pad(x.unflatten(1, tuple(extents)), (0, 0, 0, 0, *padding))
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    sums = padded.reshape(x.shape[0], *cells, *x.shape[2:]).sum([2 * axis + 2 for axis in range(axes)], dtype=dtype)
    sizes = torch.ones((), dtype=dtype, device=x.device)
    for extent, block, count in zip(extents, blocks, counts, strict=True):
        own = (extent - block * torch.arange(count, device=x.device)).clamp_max(block)
        sizes = sizes[..., None] * own
    return (sums / sizes[..., None, None]).flatten(1, axes)


def _spread(coarse: torch.Tensor, extents: Sequence[int], blocks: Sequence[int]) -> torch.Tensor:
    """Every row's own: `[batch, tiles, heads, head_dim]` to `[batch, rows, heads, head_dim]`."""
    counts = _counts(extents, blocks)
    batch, _, *rest = coarse.shape
    single = [side for count in counts for side in (count, 1)]
    cells = [side for pair in zip(counts, blocks, strict=True) for side in pair]
    # Repeated by expanding and not by indices, whose gradient would be a sum in no fixed order.
    rows = coarse.reshape(batch, *single, *rest).expand(batch, *cells, *rest)
    rows = rows.reshape(batch, *(count * block for count, block in zip(counts, blocks, strict=True)), *rest)
    for axis, extent in enumerate(extents):
        rows = rows.narrow(1 + axis, 0, extent)
    return rows.flatten(1, len(counts))
