"""The public op: checks its arguments, and takes the shortest way to an implementation."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Hashable, Sequence

import torch

from .arguments import (
    COMBINES,
    DTYPES,
    IMPLEMENTATIONS,
    check_auto_block_size,
    check_choice,
    check_combine,
    check_context,
    check_scale,
    check_tensors,
)
from .operators import Attention, Numbers, attention_op, forward
from .problem import Problem
from .selection import SELECTIONS
from .tiles import TileGrid, check_block_size, check_top_k, check_video_shape, fitting_block_size, num_kept_tiles

__all__ = ["COMBINES", "IMPLEMENTATIONS", "check_auto_block_size", "check_choice", "video_sparse_attention"]
FEW_TILES = 16
# Whether a traced call can find out that a number is a symbol.
TELLS_SYMBOLS = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 8)
PLAIN_TENSORS = frozenset((torch.Tensor, torch.nn.Parameter, type(None)))
PLAIN_VALUES = frozenset((int, float, str, type(None)))  # which cannot change


def video_sparse_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    video_shape: Sequence[int],
    *,
    top_k_ratio: float = 0.5,
    top_k: int | None = None,
    block_size: Sequence[int] | str = (4, 4, 4),
    gate: torch.Tensor | None = None,
    combine: str | None = None,
    scale: float | None = None,
    context_tokens: tuple[int, int] = (0, 0),
    context_mask: torch.Tensor | None = None,
    selection: str = "mean",
    implementation: str = "auto",
) -> torch.Tensor:
    """Video Sparse Attention (https://arxiv.org/abs/2505.13389) over a 3D grid of tokens, differentiable.

    The grid is cut into tiles. Tile means of query and key give coarse scores; each query tile keeps the `top_k` key
    tiles that score highest for its head (see `selection`), and attends exactly to their tokens (the sparse branch).
    Attention between the tile means is the coarse branch.

    Args:
        query: `[batch, sequence, heads, head_dim]`.
        key: of the same shape, dtype and device.
        value: likewise.
        video_shape: `(T, H, W)`, the grid of video tokens after patchification.
        top_k_ratio: share of key tiles that each query tile keeps, in (0, 1]; lower is sparser.
        top_k: number of key tiles to keep, instead of `top_k_ratio`; more than there are means all.
        block_size: `(t, h, w)`, tokens per tile along each axis, at most 128 in all; or `"auto"`, the block of at most
            64 tokens that wastes least on this video shape (not with a gate, which is trained for one block size).
        gate: `[batch, sequence, heads, head_dim]`, weight of the coarse branch, used as it is (no activation).
        combine: `"gate"`: sparse + gate * coarse. `"sum"`: sparse + coarse. `"sparse"`: sparse alone. `"merge"`: one
            softmax over the selected tiles' tokens and one pooled key per unselected tile with logit
            `scale * q . mean(k) + log(tile size)`; needs no training. `None`: "gate" if there is a gate, else "sum".
        scale: factor on the logits; `head_dim**-0.5` if `None`.
        context_tokens: `(before, after)`, tokens in the sequence that are not on the grid (text, reference frames).
            Every video query attends to all of them exactly; they attend densely to everything.
        context_mask: bool `[batch, before + after]`, False where a context key is padding.
        selection: what key tiles are scored by. `"mean"`: the logit between tile means. `"quarters"`: the highest logit
            between means of 2 x 2 quarters of the tiles in space, weighed by their tokens; it comes closer to dense
            attention and makes 16 times the products of scores, a few percent of a call's time. The coarse branch and
            pooled keys stay tile means.
        implementation: `"triton"`, kernels for CUDA and ROCm devices; `"torch"`, which runs on any device; or `"auto"`,
            the kernels for 16-bit inputs where they can run.

    Returns:
        `[batch, sequence, heads, head_dim]`, in the dtype of `query`.

    Raises:
        ValueError, TypeError: an argument is not as described above.
        RuntimeError: `implementation="triton"` cannot run here; the message says why.
    """
    tensors = query, key, value, gate, context_mask
    needs_dispatcher = _needs_dispatcher(tensors)
    request = None
    if not needs_dispatcher:
        numbers = video_shape, block_size, context_tokens, top_k_ratio, top_k, combine, scale, selection, implementation
        request = _request(query, gate, *numbers)
        problem = _problems.get(request)
        if problem is not None and _fit(query, key, value, gate):
            if context_mask is not None:
                check_tensors(query, key, value, gate, context_mask)
                check_context(query, problem.grid.video_shape, context_tokens, context_mask)
            return _attend(*tensors, problem, implementation)
    check_tensors(query, key, value, gate, context_mask)
    video_shape = check_video_shape(video_shape)
    combine = check_combine(combine, gate)
    block = None  # the one that fits
    if isinstance(block_size, str):
        check_auto_block_size(block_size, combine)
    else:
        block = check_block_size(block_size)
    before, after = check_context(query, video_shape, context_tokens, context_mask)
    check_choice("selection", selection, SELECTIONS)
    check_choice("implementation", implementation, IMPLEMENTATIONS)
    top_k = check_top_k(top_k, top_k_ratio)
    scale = check_scale(scale, query.shape[-1])
    if needs_dispatcher:
        kept = _kept(block and TileGrid(video_shape, block), top_k, top_k_ratio)
        rest = combine, scale, before, after, selection, implementation
        asked = Numbers(video_shape, block or (), kept[0], *rest, *kept[1:])
        gate = gate if gate is None else gate.to(query.dtype)
        return attention_op(query, key, value, gate, context_mask, *asked)[0]
    grid = TileGrid(video_shape, block or _fitting_block_size(video_shape))
    if grid.num_tiles < FEW_TILES:
        _warn_few_tiles(grid)
    problem = Problem(grid, num_kept_tiles(grid, top_k, top_k_ratio), combine, scale, before, after, selection)
    if request is not None:
        _problems.remember(request, problem)
    return _attend(*tensors, problem, implementation)


def _attend(query, key, value, gate, context_mask, problem: Problem, implementation: str) -> torch.Tensor:
    """The output of a call that has passed the checks, without the dispatcher."""
    if gate is not None and gate.dtype != query.dtype:
        gate = gate.to(query.dtype)
    tensors = query, key, value, gate, context_mask
    if _needs_gradients(tensors):
        return Attention.apply(*tensors, problem, implementation)
    return forward(*tensors, problem, implementation, output_alone=True)[0]


def _fit(query, key, value, gate) -> bool:
    """Whether the tensors fit those of a call that passed the checks; if not, the checks say why."""
    try:
        for tensor in (key, value) if gate is None else (key, value, gate):
            if tensor.shape != query.shape or tensor.device != query.device or tensor.layout != query.layout:
                return False
        return key.dtype == value.dtype == query.dtype and (gate is None or gate.dtype in DTYPES)
    except (AttributeError, RuntimeError):  # of no tensor, or of a nested one
        return False


def _kept(grid: TileGrid | None, top_k: int | None, top_k_ratio: float) -> tuple[int, float, torch.Tensor | None]:
    """Number of kept tiles, or a ratio by which the operator finds it, if need be as a tensor.

    A compiled graph can take a whole number as a symbol, but a float that decides a size makes it another graph.
    """
    if top_k is not None:
        return (top_k if grid is None else num_kept_tiles(grid, top_k, top_k_ratio)), 0.0, None
    if TELLS_SYMBOLS and torch.compiler.is_compiling():
        from torch.fx.experimental.symbolic_shapes import has_static_value

        if not has_static_value(top_k_ratio):
            return 0, 0.0, torch.ones((), dtype=torch.float64) * top_k_ratio
    if grid is None:
        return 0, float(top_k_ratio), None
    return num_kept_tiles(grid, top_k, top_k_ratio), 0.0, None


def _needs_dispatcher(tensors: Sequence[torch.Tensor | None]) -> bool:
    """Whether this call must go through the registered operator, which takes the host longer than the launches do."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return True
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    return not PLAIN_TENSORS.issuperset(map(type, tensors))


def _needs_gradients(tensors: Sequence[torch.Tensor | None]) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _request(query, gate, video_shape, block_size, context_tokens, *others) -> Hashable:
    """What decides the problem of a call: its arguments as they came, and their types, so that equals are not mixed up.

    Without types `Decimal("0.5")`, which is refused as a ratio, would be found as 0.5. `None` where an argument is
    unusual: it may change between calls, as a list or a tensor, or be an iterator, which can be looked at only once.
    """
    if type(video_shape) is not tuple or type(context_tokens) is not tuple or type(block_size) not in (tuple, str):
        return None
    types = tuple(map(type, (*video_shape, *block_size, *context_tokens, *others)))
    if not PLAIN_VALUES.issuperset(types):
        return None
    try:
        form = query.shape, query.dtype, query.layout
    except (AttributeError, RuntimeError):  # of no tensor, or of a nested one
        return None
    return types, video_shape, block_size, context_tokens, *others, *form, gate is None


class _Problems(dict):
    """The latest requests that passed the checks, at most `most`, and their problems; `None` is none of them."""

    most = 512

    def remember(self, request: Hashable, problem: Problem) -> None:
        while len(self) >= self.most:
            self.pop(next(iter(self)), None)
        self[request] = problem


_problems = _Problems()
_fitting_block_size = functools.lru_cache(maxsize=256)(fitting_block_size)


@functools.lru_cache(maxsize=256)
def _warn_few_tiles(grid: TileGrid) -> None:
    warnings.warn(
        f"video_shape={grid.video_shape} with block_size={grid.block_size} makes {grid.num_tiles} tiles; with fewer "
        f"than {FEW_TILES} sparse attention has little to skip, and dense attention is likely as fast.",
        stacklevel=4,
    )
