"""The whole backward pass: what it recomputes, in which order its kernels run, and for how many heads at a time."""

from __future__ import annotations

import contextlib

import torch

from ..torch_impl import Problem
from .coarse import coarse_attention, coarse_gradients
from .invert import invert, restore
from .key_gradient import key_gradient, proxy_gradients
from .pool import pool
from .prepare import prepare
from .query_gradient import query_gradient
from .run import dense_rows, this_device
from .tuning import BackwardLaunch, BackwardPlan, backward_plan


def backward(
    grad_output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gate: torch.Tensor | None,
    context_mask: torch.Tensor | None,
    indices: torch.Tensor,
    lse: torch.Tensor,
    output: torch.Tensor,
    problem: Problem,
    launch: BackwardLaunch | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Gradients of query, key, value and gate, `[B, S, H, D]`, from what the forward pass returned.

    `launch` overrides the tuning table.
    """
    query, key, value, output, grad_output = (dense_rows(x) for x in (query, key, value, output, grad_output))
    gate = None if gate is None else dense_rows(gate)
    # Loads of 8 bits, even those of a mask, make Triton lay out 16-bit operands a second time.
    context_mask = None if context_mask is None else context_mask.to(torch.int32).contiguous()
    heads = query.shape[2]
    token_stride = max(x.stride(1) for x in (query, key, value, grad_output))
    chosen = backward_plan(query, problem, this_device(query), token_stride, launch)
    grads = [torch.empty_like(query, memory_format=torch.contiguous_format) for _ in range(3 if gate is None else 4)]
    grad_gate = None if gate is None else grads[3]
    tensors = (query, key, value, gate, output, grad_output, *grads[:3], grad_gate)
    with contextlib.nullcontext() if query.device.type != "cuda" else torch.cuda.device(query.device):
        for first in range(0, heads, chosen.heads):
            part = slice(first, first + chosen.heads)
            some = [None if x is None else x[:, :, part] for x in tensors]
            _some_heads(some, context_mask, indices[:, part], lse[:, part], problem, chosen)
    return (*grads[:3], grad_gate)


def _some_heads(tensors, context_mask, indices, lse, problem: Problem, chosen: BackwardPlan) -> None:
    """All kernels for some of the heads; what they need in between is freed on return."""
    query, key, value, gate, output, grad_output, grad_query, grad_key, grad_value, grad_gate = tensors
    keys_tiled, queries_tiled = (x.layout != "direct" for x in (chosen.query, chosen.key))
    pooled = pool(query, key, value, problem, tiled=keys_tiled)
    coarse = None
    if problem.has_coarse:
        coarse, coarse_lse = coarse_attention(pooled.means, problem.scale, chosen.precision)
    prepared = prepare(query, output, grad_output, gate, coarse, lse, grad_gate, problem, tiled=queries_tiled)
    kept = restore(indices, problem, tiled=keys_tiled)
    query_means = means = None
    if problem.has_coarse:
        query_means, means = coarse_gradients(pooled.means, coarse_lse, prepared, problem.scale, chosen.precision)
    elif problem.combine == "merge" and problem.top_k < problem.grid.num_tiles:
        means = proxy_gradients(query, grad_output, pooled, prepared, kept.bits, problem, chosen.key)
    query_gradient(
        query,
        key,
        value,
        grad_output,
        context_mask,
        pooled,
        prepared,
        kept,
        query_means,
        grad_query,
        problem,
        chosen.query,
    )
    bits = kept.bits
    del pooled, kept  # the lists of the key tiles take their room
    keepers = invert(bits, problem, tiled=queries_tiled)
    key_gradient(
        query,
        key,
        value,
        grad_output,
        context_mask,
        prepared,
        keepers,
        means,
        grad_key,
        grad_value,
        problem,
        chosen.key,
    )
