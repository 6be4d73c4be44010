"""The operation once more, straight from its formulas: dense masks, fp64, one loop per batch item, head and tile."""

from __future__ import annotations

import math

import torch


def tile_numbers(video_shape, block_size) -> torch.Tensor:
    """The tile of every token in sequence order, `[T * H * W]`."""
    axes = [torch.arange(extent) // block for extent, block in zip(video_shape, block_size, strict=True)]
    n_h, n_w = (-(-video_shape[axis] // block_size[axis]) for axis in (1, 2))
    t, h, w = torch.meshgrid(*axes, indexing="ij")
    return ((t * n_h + h) * n_w + w).flatten()


def coarse_scores(query, key, video_shape, block_size, scale=None, before=0) -> torch.Tensor:
    """Scores between tile means, `[batch, heads, tiles, tiles]`, fp64."""
    tile = tile_numbers(video_shape, block_size).to(query.device)
    video = slice(before, before + len(tile))
    means = [_means(x[:, video].double().transpose(1, 2), tile) for x in (query, key)]
    return (scale or query.shape[-1] ** -0.5) * means[0] @ means[1].transpose(-1, -2)


def quarter_numbers(video_shape, block_size) -> torch.Tensor:
    """The quarter (0 to 3) of its tile that every token in sequence order lies in, `[T * H * W]`."""
    _, h, w = torch.meshgrid(*(torch.arange(extent) for extent in video_shape), indexing="ij")
    below, right = (x % block >= math.ceil(block / 2) for x, block in zip((h, w), block_size[1:], strict=True))
    return (2 * below + right).flatten()


def quarter_scores(query, key, video_shape, block_size, scale=None, before=0) -> torch.Tensor:
    """The highest logit between quarters of two tiles, `[batch, heads, tiles, tiles]`, fp64."""
    tile, quarter = tile_numbers(video_shape, block_size), quarter_numbers(video_shape, block_size)
    member = torch.nn.functional.one_hot(4 * tile + quarter, 4 * int(tile.max()) + 4).to(query.device).double()
    counts = member.sum(0)
    pool = (member / counts.clamp_min(1)).T
    q, k = (pool @ x[:, before : before + len(tile)].double().transpose(1, 2) for x in (query, key))
    logits = (scale or query.shape[-1] ** -0.5) * q @ k.transpose(-1, -2) + counts.log() + counts.log()[:, None]
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
    scale = scale or query.shape[-1] ** -0.5
    tile = tile_numbers(video_shape, block_size)
    num_tiles = int(tile.max()) + 1
    video = slice(before, before + len(tile))
    scores = coarse_scores(query, key, video_shape, block_size, scale, before)
    selected_by = SCORES[selection](query, key, video_shape, block_size, scale, before)
    q, k, v = (x.double().transpose(1, 2) for x in (query, key, value))  # [B, H, S, D]
    sequence = q.shape[2]
    is_context = torch.ones(sequence, dtype=torch.bool)
    is_context[video] = False
    sizes = torch.bincount(tile, minlength=num_tiles)
    mean_k, mean_v = _means(k[:, :, video], tile), _means(v[:, :, video], tile)
    out = torch.empty_like(q)
    for b in range(q.shape[0]):
        valid = torch.ones(sequence, dtype=torch.bool)
        if context_mask is not None:
            valid[is_context] = context_mask[b]
        for h in range(q.shape[1]):
            logits = scale * q[b, h] @ k[b, h].T
            allowed = valid.expand(sequence, sequence).clone()
            kept = torch.zeros(num_tiles, num_tiles, dtype=torch.bool)
            kept.scatter_(1, selected_by[b, h].topk(top_k, dim=1).indices, True)
            allowed[video, video] = kept[tile][:, tile]
            logits = logits.masked_fill(~allowed, -math.inf)
            values = v[b, h]
            if combine == "merge":
                pooled = scale * q[b, h] @ mean_k[b, h].T + sizes.double().log()
                unselected = torch.zeros(sequence, num_tiles, dtype=torch.bool)
                unselected[video] = ~kept[tile]
                logits = torch.cat([logits, pooled.masked_fill(~unselected, -math.inf)], 1)
                values = torch.cat([values, mean_v[b, h]])
            out[b, h] = logits.softmax(1) @ values
            if combine in ("gate", "sum"):
                coarse = (scores[b, h].softmax(1) @ mean_v[b, h])[tile]
                weight = gate[b, video, h].double() if combine == "gate" else 1.0
                out[b, h, video] += weight * coarse
    return out.transpose(1, 2)


def _means(x: torch.Tensor, tile: torch.Tensor) -> torch.Tensor:
    membership = torch.nn.functional.one_hot(tile).double()
    return torch.einsum("bhsd,sn->bhnd", x, membership / membership.sum(0))


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """`||actual - expected|| / ||expected||`; NaN never passes a comparison."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-30))
