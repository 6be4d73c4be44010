"""The public op: validates its arguments, chooses an implementation, and registers one operator with autograd."""

from __future__ import annotations

import functools
import importlib.util
import sys
import warnings
from collections.abc import Hashable, Sequence

import torch

from . import torch_backward, torch_impl
from .problem import Problem
from .selection import SELECTIONS
from .tiles import (
    TileGrid,
    check_block_size,
    check_top_k,
    check_video_shape,
    fitting_block_size,
    num_selected_tiles,
    whole,
)

COMBINES = ("gate", "sum", "sparse", "merge")
IMPLEMENTATIONS = ("auto", "triton", "torch")
FEW_TILES = 16
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
    needs_gradients = not needs_dispatcher and _needs_gradients(tensors)
    call = None
    if context_mask is None and not (needs_dispatcher or needs_gradients):
        call = _call_key(
            video_shape, block_size, context_tokens, top_k_ratio, top_k, combine, scale, selection, implementation
        )
        if call is not None and (again := _forward_again(call, query, key, value, gate)) is not None:
            return again
    video_shape = check_video_shape(video_shape)
    if isinstance(block_size, str):
        check_auto_block_size(block_size, "gate" if gate is not None else combine)
        fitting = fitting_block_size if torch.compiler.is_compiling() else _fitting_block_size
        block_size = fitting(video_shape)
    grid = TileGrid(video_shape, check_block_size(block_size))
    before, after = _check_context(query, grid, context_tokens, context_mask)
    combine = _check_tensors(query, key, value, gate, combine)
    if gate is not None:
        gate = gate.to(query.dtype)
    check_choice("selection", selection, SELECTIONS)
    check_choice("implementation", implementation, IMPLEMENTATIONS)
    check_top_k(top_k, top_k_ratio)
    count = num_selected_tiles(grid.num_tiles, top_k_ratio) if top_k is None else min(whole(top_k), grid.num_tiles)
    if not torch.compiler.is_compiling() and grid.num_tiles < FEW_TILES:
        _warn_few_tiles(grid)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    tensors = query, key, value, gate, context_mask
    if needs_dispatcher:
        numbers = grid.video_shape, grid.block_size, count, combine, scale, before, after, selection
        output, *_ = _forward_op(*tensors, *numbers, implementation)
    else:
        problem = Problem(grid, count, combine, scale, before, after, selection)
        if needs_gradients:
            return _Attention.apply(*tensors, problem, implementation)
        output, *_ = _forward(*tensors, problem, implementation, output_alone=True, call=call)
    return output


def _needs_dispatcher(tensors: Sequence[torch.Tensor | None]) -> bool:
    """Whether this call must go through the registered operator, which takes the host longer than the launches do."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return True
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    return not PLAIN_TENSORS.issuperset(map(type, tensors))


def _needs_gradients(tensors: Sequence[torch.Tensor | None]) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _call_key(video_shape, block_size, context_tokens, *others) -> Hashable:
    """What a call is remembered by: its arguments as they came, and their types, so that the checks treat equals alike.

    Without types `Decimal("0.5")`, which is refused as a ratio, would be found as 0.5. `None` where an argument is
    unusual: it may change between calls, as a list or a tensor, or be an iterator, which can be looked at only once.
    """
    if type(video_shape) is not tuple or type(context_tokens) is not tuple or type(block_size) not in (tuple, str):
        return None
    types = tuple(map(type, (*video_shape, *block_size, *context_tokens, *others)))
    return (types, video_shape, block_size, context_tokens, *others) if PLAIN_VALUES.issuperset(types) else None


def _forward_again(call: Hashable, query, key, value, gate) -> torch.Tensor | None:
    """The output of a call whose like passed the checks and was recorded; `None` if none was."""
    if f"{__package__}.kernels" not in sys.modules:  # nothing is recorded yet, and importing them takes a while
        return None
    from . import kernels

    return kernels.forward_again(call, query, key, value, gate)


_fitting_block_size = functools.lru_cache(maxsize=256)(fitting_block_size)


def check_choice(name: str, value: str | None, choices: Sequence[str]) -> None:
    """Raise `ValueError` unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(map(repr, choices))}.")


def check_auto_block_size(block_size: str, combine: str | None) -> None:
    """Raise `ValueError` unless a block size given as text is `"auto"` and no gate was trained for another."""
    check_choice("block_size", block_size, ("auto",))
    if combine == "gate":
        raise ValueError(
            'block_size="auto" does not go with combine="gate": gates are trained for one block size; pass that one, '
            "for example (4, 4, 4)."
        )


def _check_tensors(query, key, value, gate, combine: str | None) -> str:
    """Check that the tensors fit each other, and return the combine mode they ask for."""
    for name, tensor in (("key", key), ("value", value)):
        for what in ("shape", "dtype", "device"):
            ours, theirs = getattr(query, what), getattr(tensor, what)
            if ours != theirs:
                ours, theirs = (tuple(x) if what == "shape" else x for x in (ours, theirs))
                raise ValueError(
                    f"{name}.{what}={theirs} does not match query.{what}={ours}; query, key and value must all be "
                    "[batch, sequence, heads, head_dim] of one shape, dtype and device."
                )
    if not query.dtype.is_floating_point or query.dtype.itemsize < 2:
        raise ValueError(f"query.dtype={query.dtype} is not supported; use float32, float16 or bfloat16.")
    if combine is None:
        combine = "sum" if gate is None else "gate"
    check_choice("combine", combine, COMBINES)
    if (combine == "gate") != (gate is not None):
        raise ValueError(
            'combine="gate" needs gate=, a tensor [batch, sequence, heads, head_dim]; pass it, or choose "merge".'
            if gate is None
            else f'gate was given, but combine={combine!r} does not use it; pass combine="gate" or gate=None.'
        )
    if gate is not None and (gate.shape != query.shape or gate.device != query.device):
        raise ValueError(
            f"gate.shape={tuple(gate.shape)} on {gate.device} must equal query.shape={tuple(query.shape)} on "
            f"{query.device}; unflatten the projection into [batch, sequence, heads, head_dim]."
        )
    return combine


def _check_context(query, grid: TileGrid, context_tokens, context_mask) -> tuple[int, int]:
    if query.ndim != 4:
        raise ValueError(
            f"query.shape={tuple(query.shape)} must be [batch, sequence, heads, head_dim], the layout diffusers uses."
        )
    try:
        before, after = (int(count) for count in context_tokens)
    except (TypeError, ValueError):
        before = after = -1
    if before < 0 or after < 0:
        raise ValueError(f"context_tokens={context_tokens!r} must be two counts (before, after), for example (0, 256).")
    batch, sequence = query.shape[:2]
    if before + grid.num_tokens + after != sequence:
        T, H, W = grid.video_shape
        context = f" plus {before} + {after} context tokens" if before or after else ""
        raise ValueError(
            f"video_shape={grid.video_shape} has {T} * {H} * {W} = {grid.num_tokens} tokens{context}, but the sequence "
            f"holds {sequence}; pass the grid after patchification, and count all other tokens in context_tokens."
        )
    if context_mask is not None and (
        context_mask.shape != (batch, before + after)
        or context_mask.dtype != torch.bool
        or context_mask.device != query.device
    ):
        raise ValueError(
            f"context_mask of shape {tuple(context_mask.shape)}, {context_mask.dtype} on {context_mask.device} must be "
            f"bool [batch, before + after] = {(batch, before + after)} on {query.device}, True for valid keys."
        )
    return before, after


@functools.lru_cache(maxsize=256)
def _warn_few_tiles(grid: TileGrid) -> None:
    warnings.warn(
        f"video_shape={grid.video_shape} with block_size={grid.block_size} makes {grid.num_tiles} tiles; with fewer "
        f"than {FEW_TILES} sparse attention has little to skip, and dense attention is likely as fast.",
        stacklevel=4,
    )


_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? gate, Tensor? context_mask, {}SymInt[] video_shape, "
    "SymInt[] block_size, SymInt top_k, str combine, float scale, SymInt before, SymInt after, str selection"
)


@torch.library.custom_op(
    "vsa_diffusers::attention",
    mutates_args=(),
    schema=f"({_ARGUMENTS.format('')}, str implementation) -> (Tensor, Tensor, Tensor)",
)
def _forward_op(query, key, value, gate, context_mask, *numbers):
    """Output, selected tiles, and the log-sum-exp `[B, H, S]`, which is empty where the PyTorch implementation ran."""
    *numbers, implementation = numbers
    return _forward(query, key, value, gate, context_mask, _problem(*numbers), implementation)


def _forward(
    query,
    key,
    value,
    gate,
    context_mask,
    problem: Problem,
    implementation: str,
    output_alone: bool = False,
    call: Hashable = None,
):
    """What the registered operator returns, from the kernels or from PyTorch.

    With `output_alone` the caller wants nothing but the output, and the kernels return nothing else. `call` is what
    they remember it by.
    """
    if _runs_triton(implementation, query, problem):
        from . import kernels

        return kernels.forward(query, key, value, gate, context_mask, problem, output_alone=output_alone, call=call)
    return *torch_impl.forward(query, key, value, gate, context_mask, problem), query.new_empty(0, dtype=torch.float32)


@_forward_op.register_fake
def _(query, key, value, gate, context_mask, *numbers):
    *numbers, implementation = numbers
    problem = _problem(*numbers)
    batch, sequence, heads, _ = query.shape
    indices = query.new_empty((batch, heads, problem.grid.num_tiles, problem.top_k), dtype=torch.int32)
    rows = (batch, heads, sequence) if _runs_triton(implementation, query, problem) else (0,)
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    return output, indices, query.new_empty(rows, dtype=torch.float32)


@torch.library.custom_op(
    "vsa_diffusers::attention_backward",
    mutates_args=(),
    schema="(Tensor grad_output, "
    + _ARGUMENTS.format("Tensor indices, Tensor lse, Tensor? output, ")
    + ") -> (Tensor, Tensor, Tensor, Tensor)",
)
def _backward_op(grad_output, query, key, value, gate, context_mask, indices, lse, output, *numbers):
    """Gradients of query, key, value and gate (empty without a gate)."""
    saved = (query, key, value, gate, context_mask, indices, lse, output)
    grads = _gradients(grad_output, *saved, _problem(*numbers))
    return tuple(query.new_empty(0) if grad is None else grad.contiguous() for grad in grads)


def _gradients(grad_output, query, key, value, gate, context_mask, indices, lse, output, problem: Problem):
    """Gradients of query, key, value and gate (or `None`), by the implementation that ran forward."""
    given = (grad_output, query, key, value, gate, context_mask, indices)
    if output is None:
        return torch_backward.backward(*given, problem)
    from . import kernels

    return kernels.backward(*given, lse, output, problem)


@_backward_op.register_fake
def _(grad_output, query, key, value, gate, *_):
    empty = functools.partial(torch.empty_like, memory_format=torch.contiguous_format)
    return empty(query), empty(key), empty(value), query.new_empty(0) if gate is None else empty(gate)


class _Attention(torch.autograd.Function):
    """The same formula as the registered operator's, for eager calls."""

    @staticmethod
    def forward(ctx, query, key, value, gate, context_mask, problem, implementation):
        tensors = (query, key, value, gate, context_mask)
        results = _forward(*tensors, problem, implementation)
        ctx.problem = problem
        _save(ctx, tensors, results)
        return results[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        return (*_gradients(grad_output, *ctx.saved_tensors, ctx.problem), None, None, None)


def _save(ctx, tensors, results) -> None:
    output, indices, lse = results
    # The PyTorch implementation recomputes what it needs, and has no log-sum-exp.
    ctx.save_for_backward(*tensors, indices, lse, output if lse.ndim == 3 else None)


def _save_for_backward(ctx, inputs, output) -> None:
    ctx.numbers = inputs[5:-1]
    _save(ctx, inputs[:5], output)


def _backward(ctx, grad_output, *_):
    saved = ctx.saved_tensors  # once: gradient checkpointing recomputes them, and only once
    *grads, grad_gate = _backward_op(grad_output, *saved, *ctx.numbers)
    gate = grad_gate if saved[3] is not None else None
    return (*grads, gate, *[None] * (2 + len(ctx.numbers)))


_forward_op.register_autograd(_backward, setup_context=_save_for_backward)


def _problem(video_shape, block_size, top_k, combine, scale, before, after, selection) -> Problem:
    grid = TileGrid(tuple(video_shape), tuple(block_size))
    return Problem(grid, top_k, combine, scale, before, after, selection)


def _runs_triton(implementation: str, query: torch.Tensor, problem: Problem) -> bool:
    """Whether this call goes to the Triton kernels. An explicit choice that cannot run is an error."""
    # In fp32 the kernels do without tensor cores and spill; they are there for checking.
    if implementation == "torch" or (implementation == "auto" and query.element_size() > 2):
        return False
    reason: str | None = 'Triton is not installed; install it with `pip install triton`, or choose "torch".'
    if importlib.util.find_spec("triton") is not None:
        from . import kernels

        reason = kernels.why_not(query, problem.grid.num_tiles)
    if reason is not None and implementation == "triton":
        raise RuntimeError(f'implementation="triton": the kernels cannot run here: {reason}')
    return reason is None
