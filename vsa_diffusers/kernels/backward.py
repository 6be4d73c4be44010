"""The whole backward pass: what it recomputes, in which order its kernels run, and for how many heads at a time."""

from __future__ import annotations

import torch

from ..problem import Problem
from .launch import dense_rows, launch_or_replay, words_of
from .plans import BackwardLaunch, BackwardPlan
from .recording import Tensors, Work
from .select.coarse import coarse_attention, coarse_gradients
from .select.pool import pool
from .select.transpose_lists import invert, restore
from .sparse.backward_key import key_gradient
from .sparse.backward_pooled import proxy_gradients
from .sparse.backward_preprocess import prepare
from .sparse.backward_query import query_gradient
from .support import this_device
from .tuning import backward_plan


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
    context_mask = None if context_mask is None else words_of(context_mask)
    grads = [torch.empty_like(query, memory_format=torch.contiguous_format) for _ in range(3 if gate is None else 4)]
    grad_gate = None if gate is None else grads[3]

    def launch_all(work: Work, tensors: Tensors) -> None:
        query, key, value, _, _, grad_output, *_ = tensors
        token_stride = max(x.stride(1) for x in (query, key, value, grad_output))
        chosen = backward_plan(query, problem, this_device(query), token_stride, launch)
        for first in range(0, query.shape[2], chosen.heads):
            _some_heads(work, tensors, problem, chosen, slice(first, first + chosen.heads))

    tensors = (query, key, value, gate, output, grad_output, *grads[:3], grad_gate, indices, lse, context_mask)
    launch_or_replay("backward", tensors, problem, launch, launch_all)
    return (*grads[:3], grad_gate)


def _some_heads(work: Work, tensors: Tensors, problem: Problem, chosen: BackwardPlan, heads: slice) -> None:
    """All kernels for some of the heads; what they need in between is free afterwards."""
    *sequences, indices, lse, context_mask = tensors
    sequences = work.parts(sequences, 2, heads)
    query, key, value, gate, output, grad_output, grad_query, grad_key, grad_value, grad_gate = sequences
    indices, lse = work.parts((indices, lse), 1, heads)
    keys_tiled, queries_tiled = (x.layout != "direct" for x in (chosen.query, chosen.key))
    pooled = pool(work, query, key, value, problem, tiled=keys_tiled)
    coarse = None
    if problem.has_coarse:
        coarse, coarse_lse = coarse_attention(work, pooled.means, problem.scale, chosen.precision)
    prepared = prepare(work, query, output, grad_output, gate, coarse, lse, grad_gate, problem, tiled=queries_tiled)
    kept = restore(work, indices, pooled.boxes, problem, tiled=keys_tiled)
    query_means = means = None
    if problem.has_coarse:
        query_means, means = coarse_gradients(work, pooled.means, coarse_lse, prepared, problem.scale, chosen.precision)
    elif problem.combine == "merge" and problem.top_k < problem.grid.num_tiles:
        means = proxy_gradients(work, query, grad_output, pooled, prepared, kept.bits, problem, chosen.key)
    query_gradient(
        work,
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
    # The lists of the key tiles take the room of these.
    work.free(*pooled, kept.starts, kept.tail, kept.counts)
    if problem.has_coarse:
        work.free(coarse, coarse_lse, prepared.sums, prepared.deltas, query_means)
    bits = kept.bits
    del pooled, kept
    keepers = invert(work, bits, problem, tiled=queries_tiled)
    key_gradient(
        work,
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
    work.end_part()
