"""The operation once more, straight from its formulas, with dense masks and in fp64, on any device."""

from __future__ import annotations

import math

import torch


def tile_numbers(video_shape, block_size) -> torch.Tensor:
    """The tile of every token in sequence order, `[T * H * W]`."""
    axes = [torch.arange(extent) // block for extent, block in zip(video_shape, block_size, strict=True)]
    n_h, n_w = (-(-video_shape[axis] // block_size[axis]) for axis in (1, 2))
    t, h, w = torch.meshgrid(*axes, indexing="ij")
    return ((t * n_h + h) * n_w + w).flatten()


def quarter_numbers(video_shape, block_size) -> torch.Tensor:
    """The quarter (0 to 3) of its tile that every token in sequence order lies in, `[T * H * W]`."""
    _, h, w = torch.meshgrid(*(torch.arange(extent) for extent in video_shape), indexing="ij")
    below, right = (x % block >= math.ceil(block / 2) for x, block in zip((h, w), block_size[1:], strict=True))
    return (2 * below + right).flatten()


def tile_means(x, video_shape, block_size, before=0) -> torch.Tensor:
    """Means of the tiles of `[batch, sequence, heads, head_dim]`: `[batch, heads, tiles, head_dim]`, fp64."""
    tile = tile_numbers(video_shape, block_size).to(x.device)
    return _means(x[:, before : before + len(tile)].double().transpose(1, 2), tile)


def quarter_means(x, video_shape, block_size, before=0) -> tuple[torch.Tensor, torch.Tensor]:
    """Means of the quarters, four to a tile, `[batch, heads, tiles * 4, head_dim]` and their tokens, fp64.

    Where a quarter is empty, both are zero.
    """
    tile, quarter = tile_numbers(video_shape, block_size), quarter_numbers(video_shape, block_size)
    member = torch.nn.functional.one_hot(4 * tile + quarter, 4 * int(tile.max()) + 4).to(x.device).double()
    counts = member.sum(0)
    return (member / counts.clamp_min(1)).T @ x[:, before : before + len(tile)].double().transpose(1, 2), counts


def coarse_scores(query, key, video_shape, block_size, scale=None, before=0) -> torch.Tensor:
    """Scores between tile means, `[batch, heads, tiles, tiles]`, fp64."""
    means = [tile_means(x, video_shape, block_size, before) for x in (query, key)]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return scale * means[0] @ means[1].transpose(-1, -2)


def quarter_scores(query, key, video_shape, block_size, scale=None, before=0) -> torch.Tensor:
    """The highest logit between quarters of two tiles, `[batch, heads, tiles, tiles]`, fp64."""
    (q, counts), (k, _) = (quarter_means(x, video_shape, block_size, before) for x in (query, key))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    logits = scale * q @ k.transpose(-1, -2) + counts.log() + counts.log()[:, None]
    return logits.unflatten(3, (-1, 4)).amax(-1).unflatten(2, (-1, 4)).amax(3)


SCORES = {"mean": coarse_scores, "quarters": quarter_scores}


def reference(
    query,
    key,
    value,
    video_shape,
    *,
    top_k,
    block_size,
    combine,
    gate=None,
    scale=None,
    before=0,
    context_mask=None,
    selection="mean",
) -> torch.Tensor:
    """`[batch, sequence, heads, head_dim]` in fp64. Every tensor as in `video_sparse_attention`."""
    scores = SCORES[selection](query, key, video_shape, block_size, scale, before)
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(3, scores.topk(top_k, dim=3).indices, True)
    form = {"block_size": block_size, "combine": combine, "scale": scale, "before": before}
    return attention(query, key, value, gate, context_mask, kept, video_shape, **form)[0]


def attention(
    query, key, value, gate, context_mask, kept, video_shape, *, block_size, combine, scale=None, before=0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output `[batch, sequence, heads, dim of value]` and log-sum-exp `[batch, heads, sequence]`, in fp64.

    `kept` says which tiles a query tile keeps, bool `[batch, heads, tiles, tiles]`.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    tile = tile_numbers(video_shape, block_size).to(query.device)
    video = slice(before, before + len(tile))
    q, k, v = (x.double().transpose(1, 2) for x in (query, key, value))  # [B, H, S, D]
    batch, _, sequence, _ = q.shape
    is_context = torch.ones(sequence, dtype=torch.bool, device=q.device)
    is_context[video] = False
    valid = torch.ones(batch, sequence, dtype=torch.bool, device=q.device)
    if context_mask is not None:
        valid[:, is_context] = context_mask
    pairs = kept[:, :, tile][..., tile]  # [B, H, V, V]
    allowed = valid[:, None, None].expand(*q.shape[:3], sequence).clone()
    allowed[:, :, video, video] = pairs
    logits = (scale * q @ k.transpose(-1, -2)).masked_fill(~allowed, -math.inf)
    mean_q, mean_k, mean_v = (_means(x[:, :, video], tile) for x in (q, k, v))
    values = v
    if combine == "merge":
        pooled = scale * q @ mean_k.transpose(-1, -2) + torch.bincount(tile).double().log()
        unselected = torch.zeros(pooled.shape, dtype=torch.bool, device=q.device)
        unselected[:, :, video] = ~kept[:, :, tile]
        logits = torch.cat([logits, pooled.masked_fill(~unselected, -math.inf)], -1)
        values = torch.cat([v, mean_v], 2)
    output = logits.softmax(-1) @ values
    if combine in ("gate", "sum"):
        coarse = ((scale * mean_q @ mean_k.transpose(-1, -2)).softmax(-1) @ mean_v)[:, :, tile]
        weight = gate[:, video].double().transpose(1, 2) if combine == "gate" else 1.0
        output = output + torch.nn.functional.pad(weight * coarse, (0, 0, before, sequence - video.stop))
    return output.transpose(1, 2), logits.logsumexp(-1)


def packed_tiles(segments, video_shape, block_size) -> torch.Tensor:
    """The tile of every row of a packed sequence: runs of each segment by itself, then those of the video."""
    tiles: list[torch.Tensor] = []
    parts = [torch.arange(length) // math.prod(block_size) for length in segments if length]
    for part in [*parts, tile_numbers(video_shape, block_size)]:
        tiles.append(part + (int(tiles[-1].max()) + 1 if tiles else 0))
    return torch.cat(tiles)


def fasth3(query, key, value, gate, segments, video_shape, *, top_k, block_size=(4, 4, 4)):
    """FastH3's attention in fp64, and the tiles that video tiles keep `[batch, heads, tiles, tiles]`.

    Tiles of what precedes the video are always kept, and keep all; the coarse branch has all tiles, and the gate all
    rows.
    """
    tile = packed_tiles(segments, video_shape, block_size).to(query.device)
    prefix = len(tile.unique()) - len(tile_numbers(video_shape, block_size).unique())
    q, k, v = (x.double().transpose(1, 2) for x in (query, key, value))
    scale = q.shape[-1] ** -0.5
    mean_q, mean_k, mean_v = (_means(x, tile) for x in (q, k, v))
    scores = scale * mean_q @ mean_k.transpose(-1, -2)
    kept = torch.ones_like(scores, dtype=torch.bool)
    video = scores[:, :, prefix:, prefix:]
    best = video.topk(min(top_k, video.shape[-1]), dim=3).indices
    kept[:, :, prefix:, prefix:] = torch.zeros_like(video, dtype=torch.bool).scatter_(3, best, True)
    logits = (scale * q @ k.transpose(-1, -2)).masked_fill(~kept[:, :, tile][..., tile], -math.inf)
    coarse = (scores.softmax(-1) @ mean_v)[:, :, tile]
    output = logits.softmax(-1) @ v + gate.double().transpose(1, 2) * coarse
    return output.transpose(1, 2), kept


def _means(x: torch.Tensor, tile: torch.Tensor) -> torch.Tensor:
    membership = torch.nn.functional.one_hot(tile).double()
    return (membership / membership.sum(0)).T @ x


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """`||actual - expected|| / ||expected||`; NaN never passes a comparison."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-30))
