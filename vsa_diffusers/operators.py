"""The operation as an operator that PyTorch knows: how it runs, what it returns to a tracer, and its gradient."""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch

from . import torch_backward, torch_impl
from .calls import running
from .problem import Problem
from .tiles import TileGrid, fitting_block_size, num_kept_tiles

logger = logging.getLogger(__name__)
NO_GPU = ("cpu", "meta")
_told: set[str] = set()  # kinds of reasons, few

_NUMBERS = (
    "SymInt[] video_shape, SymInt[] block_size, SymInt top_k, str combine, float scale, SymInt before, SymInt after, "
    "str selection, str implementation, float top_k_ratio=0.0, Tensor? symbolic_ratio=None"
)
_TENSORS = "Tensor query, Tensor key, Tensor value, Tensor? gate, Tensor? context_mask"


class Numbers(NamedTuple):
    """The operator's arguments after its tensors.

    The block size is empty if it is to fit the video shape, and a ratio, if there is one, goes before `top_k`. Both are
    settled late, when the operator runs: a tracer that has symbols for numbers could not. It cannot know either how
    many indices there are then, so none are returned, and the backward pass runs the forward again.
    """

    video_shape: Sequence[int]
    block_size: Sequence[int]
    top_k: int
    combine: str
    scale: float
    before: int
    after: int
    selection: str
    implementation: str
    top_k_ratio: float = 0.0
    symbolic_ratio: torch.Tensor | None = None  # a number in fp64, where a compiler has no other way to pass it

    @property
    def are_late(self) -> bool:
        """Whether only the operator that runs knows the block size and the number of kept tiles."""
        return not self.block_size or self.top_k_ratio > 0 or self.symbolic_ratio is not None

    @property
    def problem(self) -> Problem:
        """What is to be computed."""
        T, H, W = self.video_shape
        t, h, w = self.block_size or fitting_block_size((T, H, W))
        grid = TileGrid((T, H, W), (t, h, w))
        ratio = self.top_k_ratio if self.symbolic_ratio is None else self.symbolic_ratio.item()
        count = num_kept_tiles(grid, None if ratio > 0 else self.top_k, ratio)
        return Problem(grid, count, self.combine, self.scale, self.before, self.after, self.selection)


@torch.library.custom_op(
    "vsa_diffusers::attention", mutates_args=(), schema=f"({_TENSORS}, {_NUMBERS}) -> (Tensor, Tensor, Tensor)"
)
def attention_op(query, key, value, gate, context_mask, *numbers):
    """Output, selected tiles, and the log-sum-exp `[B, H, S]`, which is empty where the PyTorch implementation ran.

    The tiles `[B, H, N, K]` come flattened: a compiler makes a graph of its own for every axis of one element.
    """
    asked = Numbers(*numbers)
    output, indices, lse = forward(query, key, value, gate, context_mask, asked.problem, asked.implementation)
    if asked.are_late:
        return output, _nothing(indices), _nothing(lse)
    return output, indices.flatten(), lse


def forward(
    query,
    key,
    value,
    gate,
    context_mask,
    problem: Problem,
    implementation: str,
    output_alone: bool = False,
):
    """What the registered operator returns, from the kernels or from PyTorch.

    With `output_alone` the caller wants nothing but the output, and the kernels return nothing else.
    """
    obstacle = why_not_kernels(implementation, query, problem)
    if (tally := running.tally) is not None:
        tally.add_sparse(obstacle, problem.top_k >= problem.grid.num_tiles)
    if obstacle is None:
        from . import kernels

        return kernels.forward(query, key, value, gate, context_mask, problem, output_alone=output_alone)
    if implementation == "auto" and _is_on_gpu(query):
        _warn_slow(*obstacle)
    return *torch_impl.forward(query, key, value, gate, context_mask, problem), query.new_empty(0, dtype=torch.float32)


@attention_op.register_fake
def _(query, key, value, gate, context_mask, *numbers):
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    indices, lse = query.new_empty(0, dtype=torch.int32), query.new_empty(0, dtype=torch.float32)
    asked = Numbers(*numbers)
    if not asked.are_late:
        problem = asked.problem
        batch, sequence, heads, _ = query.shape
        indices = indices.new_empty(batch * heads * problem.grid.num_tiles * problem.top_k)
        if why_not_kernels(asked.implementation, query, problem) is None:
            lse = lse.new_empty((batch, heads, sequence))
    return output, indices, lse


@torch.library.custom_op(
    "vsa_diffusers::attention_backward",
    mutates_args=(),
    schema=f"(Tensor grad_output, {_TENSORS}, Tensor indices, Tensor lse, Tensor? output, {_NUMBERS}) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
def _backward_op(grad_output, query, key, value, gate, context_mask, indices, lse, output, *numbers):
    """Gradients of query, key, value and gate (empty without a gate)."""
    asked = Numbers(*numbers)
    tensors, problem = (query, key, value, gate, context_mask), asked.problem
    if asked.are_late:
        saved = _saved(*forward(*tensors, problem, asked.implementation))
    else:
        batch, _, heads, _ = query.shape
        saved = indices.view(batch, heads, problem.grid.num_tiles, problem.top_k), lse, output
    grads = _gradients(grad_output, *tensors, *saved, problem)
    return tuple(_nothing(query) if grad is None else grad.contiguous() for grad in grads)


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


class Attention(torch.autograd.Function):
    """The same formula as the registered operator's, for eager calls."""

    @staticmethod
    def forward(ctx, query, key, value, gate, context_mask, problem, implementation):
        """What `attention_op` returns first."""
        tensors = (query, key, value, gate, context_mask)
        output, *others = forward(*tensors, problem, implementation)
        ctx.problem = problem
        ctx.save_for_backward(*tensors, *_saved(output, *others))
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        """What `_backward_op` returns."""
        return (*_gradients(grad_output, *ctx.saved_tensors, ctx.problem), None, None, None)


def _saved(output, indices, lse):
    """What the backward pass needs; in PyTorch it recomputes the output, and has no log-sum-exp."""
    return indices, lse, output if lse.ndim == 3 else None


def _save_for_backward(ctx, inputs, output) -> None:
    *numbers, symbolic_ratio = inputs[5:]
    ctx.numbers = numbers
    ctx.save_for_backward(*inputs[:5], *_saved(*output), symbolic_ratio)


def _backward(ctx, grad_output, *_):
    # Looked at once: gradient checkpointing recomputes them, and only once.
    *saved, symbolic_ratio = ctx.saved_tensors
    *grads, grad_gate = _backward_op(grad_output, *saved, *ctx.numbers, symbolic_ratio)
    gate = grad_gate if saved[3] is not None else None
    return (*grads, gate, *[None] * (2 + len(ctx.numbers)))


attention_op.register_autograd(_backward, setup_context=_save_for_backward)


def _nothing(like: torch.Tensor) -> torch.Tensor:
    return like.new_empty(0)


@functools.lru_cache(maxsize=1)
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def why_not_kernels(implementation: str, query: torch.Tensor, problem: Problem) -> tuple[str, str] | None:
    """Why this call does not go to the Triton kernels: the kind of the reason, and the reason; `None` if it does.

    An explicit choice that cannot run is an error.
    """
    if implementation == "torch":
        return "choice", 'implementation="torch" was chosen.'
    # In fp32 the kernels do without tensor cores and spill; they are there for checking.
    if implementation == "auto" and query.element_size() > 2:
        given = f"query is {query.dtype} on {query.device}"
        return "dtype", f'they are for 16 bits on a GPU, and {given}; cast to torch.bfloat16 there, or choose "torch".'
    obstacle: tuple[str, str] | None = (
        "triton",
        'Triton is not installed; install it with `pip install triton`, or choose "torch".',
    )
    if _has_triton():
        from . import kernels

        obstacle = kernels.unsupported_reason(query, problem.grid.num_tiles)
    if obstacle is not None and implementation == "triton":
        raise RuntimeError(f'implementation="triton": the kernels cannot run here: {obstacle[1]}')
    return obstacle


def _is_on_gpu(query: torch.Tensor) -> bool:
    return query.device.type not in NO_GPU


def _warn_slow(kind: str, reason: str) -> None:
    """Once for each kind of reason in a process."""
    if kind not in _told:
        _told.add(kind)
        logger.warning(
            'implementation="auto" takes the slow PyTorch implementation on a GPU, not the Triton kernels: %s', reason
        )
