"""The coarse branch over more than the video: tiles of every segment of a packed sequence.

FastH3 (https://github.com/hao-ai-lab/FastVideo) trains gates whose coarse branch covers text, keyframes and audio with
the video. Its definition is the sparse branch plus gate times this.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .operators import NO_GPU, why_not_kernels
from .problem import Problem
from .tiles import TileGrid

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


def add_packed_coarse(
    exact: torch.Tensor,
    gate: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Sequence[int],
    video_shape: Sequence[int],
    block_size: Sequence[int],
    implementation: str = "auto",
) -> torch.Tensor:
    """`exact + gate * packed_coarse(query, key, value, ...)`, on a GPU by kernels unless gradients are recorded.

    Args:
        exact: `[batch, sequence, heads, head_dim]`, the sparse branch.
        gate: likewise, taken to its dtype.
        query, key, value, segments, video_shape, block_size: as in `packed_coarse`.
        implementation: `"auto"`, `"triton"` or `"torch"`, as in `video_sparse_attention`.

    Returns:
        Of the shape and dtype of `exact`.
    """
    tensors = (exact, gate.to(exact.dtype), query, key, value)
    sizes = (list(segments), list(video_shape), list(block_size))
    is_recorded = torch.is_grad_enabled() and any(each.requires_grad for each in tensors)
    if is_recorded or query.device.type in NO_GPU or implementation == "torch":
        return _add_in_torch(*tensors, *sizes)
    if torch.compiler.is_compiling():
        return add_packed_coarse_op(*tensors, *sizes, implementation)
    return _add(*tensors, *sizes, implementation)


def _add_in_torch(exact, gate, query, key, value, segments, video_shape, block_size) -> torch.Tensor:
    return torch.addcmul(exact, gate, packed_coarse(query, key, value, segments, video_shape, block_size))


def _add(exact, gate, query, key, value, segments, video_shape, block_size, implementation) -> torch.Tensor:
    """By the kernels where they run; where they do not, the sparse branch has said why."""
    (T, H, W), (t, h, w) = video_shape, block_size
    problem = Problem(TileGrid((T, H, W), (t, h, w)), 1, "sparse", query.shape[-1] ** -0.5)
    if why_not_kernels(implementation, query, problem) is not None:
        return _add_in_torch(exact, gate, query, key, value, segments, video_shape, block_size)
    from .kernels import packed

    return packed.add_packed_coarse(exact, gate, query, key, value, segments, video_shape, block_size)


@torch.library.custom_op(
    "vsa_diffusers::add_packed_coarse",
    mutates_args=(),
    schema="(Tensor exact, Tensor gate, Tensor query, Tensor key, Tensor value, SymInt[] segments, "
    "SymInt[] video_shape, SymInt[] block_size, str implementation) -> Tensor",
)
def add_packed_coarse_op(exact, gate, query, key, value, segments, video_shape, block_size, implementation):
    """`add_packed_coarse` as an operator that a compiler need not look into."""
    return _add(exact, gate, query, key, value, segments, video_shape, block_size, implementation)


@add_packed_coarse_op.register_fake
def _(exact, *_):
    return torch.empty_like(exact, memory_format=torch.contiguous_format)


def _counts(extents: Sequence[int], blocks: Sequence[int]) -> list[int]:
    """Number of tiles along each axis."""
    return [-(-extent // block) for extent, block in zip(extents, blocks, strict=True)]


def _means(x: torch.Tensor, extents: Sequence[int], blocks: Sequence[int]) -> torch.Tensor:
    """Means of the tiles of `[batch, rows, heads, head_dim]`: `[batch, tiles, heads, head_dim]`."""
    axes = len(extents)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    sums = x.unflatten(1, tuple(extents))
    for axis in range(axes):
        sums = _sums(sums, 1 + axis, blocks[axis], dtype)
    sizes = torch.ones((), dtype=dtype, device=x.device)
    for extent, block, count in zip(extents, blocks, _counts(extents, blocks), strict=True):
        own = (extent - block * torch.arange(count, device=x.device)).clamp_max(block)
        sizes = sizes[..., None] * own
    return (sums / sizes[..., None, None]).flatten(1, axes)


def _sums(x: torch.Tensor, axis: int, block: int, dtype: torch.dtype) -> torch.Tensor:
    """Sums of runs of `block` along an axis, the last one shorter."""
    extent = x.shape[axis]
    count = extent // block
    runs = x.narrow(axis, 0, count * block).unflatten(axis, (count, block)).sum(axis + 1, dtype=dtype)
    rest = x.narrow(axis, count * block, extent - count * block).sum(axis, keepdim=True, dtype=dtype)
    # No question about sizes, which compiled code would ask again for every length of a prompt.
    return torch.cat([runs, rest], axis).narrow(axis, 0, -(-extent // block))


def _spread(coarse: torch.Tensor, extents: Sequence[int], blocks: Sequence[int]) -> torch.Tensor:
    """Every row's own: `[batch, tiles, heads, head_dim]` to `[batch, rows, heads, head_dim]`."""
    axes = len(extents)
    rows = coarse.unflatten(1, _counts(extents, blocks))
    # Repeated by expanding and not by indices, whose gradient would be a sum in no fixed order; the first axis last, so
    # that all rows are written once, and cut off where that copies nothing.
    for axis in reversed(range(1, 1 + axes)):
        repeats = [-1] * axis + [-1, blocks[axis - 1]] + [-1] * (rows.dim() - axis - 1)
        rows = rows.unsqueeze(axis + 1).expand(repeats).flatten(axis, axis + 1).narrow(axis, 0, extents[axis - 1])
    return rows.flatten(1, axes)
