"""The whole backward pass in order: what it recomputes, and what it frees for whom, some heads at a time."""

from __future__ import annotations

import torch

from ..problem import Problem
from .buffers import BackwardTensors
from .launch import last_dim_contiguous, launch_or_replay, mask_to_int32
from .plans import BackwardLaunch, BackwardPlan
from .recording import Launcher, Tensors, form_of
from .select.coarse import coarse_attention, coarse_gradients
from .select.pool import pool
from .select.transpose_lists import rebuild_lists, transpose_lists
from .sparse.backward_key import dkdv
from .sparse.backward_pooled import pooled_dkdv
from .sparse.backward_preprocess import backward_preprocess
from .sparse.backward_query import dq
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
    query, key, value, output, grad_output = (last_dim_contiguous(x) for x in (query, key, value, output, grad_output))
    gate = None if gate is None else last_dim_contiguous(gate)
    context_mask = None if context_mask is None else mask_to_int32(context_mask)
    grads = [torch.empty_like(query, memory_format=torch.contiguous_format) for _ in range(3 if gate is None else 4)]
    grad_gate = None if gate is None else grads[3]

    def launch_all(launcher: Launcher, tensors: Tensors) -> None:
        whole = BackwardTensors._make(tensors)
        form = form_of(whole.query)
        read = [form, *(form_of(x) for x in (whole.key, whole.value, whole.grad_output))]
        chosen = backward_plan(form, read, problem, this_device(form.device), launch)
        for first in range(0, form.shape[2], chosen.heads):
            _some_heads(launcher, whole, problem, chosen, slice(first, first + chosen.heads))

    given = (query, key, value, gate, output, grad_output)
    tensors = BackwardTensors(*given, grads[0], grads[1], grads[2], grad_gate, indices, lse, context_mask)
    launch_or_replay("backward", tensors, problem, launch, launch_all)
    return (*grads[:3], grad_gate)


def _some_heads(
    launcher: Launcher, whole: BackwardTensors, problem: Problem, chosen: BackwardPlan, heads: slice
) -> None:
    """All kernels for some of the heads; what they need in between is free afterwards."""
    tensors = whole.of_heads(launcher, heads)
    keys_tiled, queries_tiled = chosen.query.reads_copy, chosen.key.reads_copy
    pooled = pool(
        launcher, tensors.query, tensors.key, tensors.value, problem, tiled=keys_tiled, warps=chosen.pool_warps
    )
    coarse = coarse_lse = grad_mean_query = grad_mean_kv = None
    if problem.has_coarse:
        coarse, coarse_lse = _recomputed_coarse(launcher, pooled.means, problem, chosen)
    preprocessed = backward_preprocess(
        launcher, tensors, coarse, problem, tiled=queries_tiled, warps=chosen.preprocess_warps
    )
    query_lists = rebuild_lists(launcher, tensors.indices, pooled.boxes, problem, chosen.rebuild, tiled=keys_tiled)
    if coarse_lse is not None:
        grad_mean_query, grad_mean_kv = coarse_gradients(
            launcher, pooled.means, coarse_lse, preprocessed, problem.scale, chosen.coarse, chosen.precision
        )
    elif problem.has_pooled_keys:
        bits = query_lists.selected_bits
        grad_mean_kv = pooled_dkdv(
            launcher, tensors, pooled, preprocessed, bits, problem, chosen.pooled, chosen.pooled_splits
        )
    dq(launcher, tensors, pooled, preprocessed, query_lists, grad_mean_query, problem, chosen.query)
    # The lists of the key tiles take the room of what dq was the last to read.
    selected_bits = query_lists.selected_bits
    launcher.free(*pooled, *(x for x in query_lists if x is not selected_bits))
    launcher.free(coarse, coarse_lse, preprocessed.grad_coarse, preprocessed.coarse_delta, grad_mean_query)
    del pooled, query_lists, coarse, coarse_lse, grad_mean_query
    key_lists = transpose_lists(launcher, selected_bits, problem, chosen.transpose, chosen.order, tiled=queries_tiled)
    dkdv(launcher, tensors, preprocessed, key_lists, grad_mean_kv, problem, chosen.key)
    launcher.free_all()


def _recomputed_coarse(
    launcher: Launcher, means: torch.Tensor, problem: Problem, chosen: BackwardPlan
) -> tuple[torch.Tensor, torch.Tensor]:
    """Coarse output fp32 `[P, N, D]` and its log-sum-exp (base 2) `[P, N]`."""
    _, batch, heads, num_tiles, dim = means.shape
    coarse = launcher.empty(means, (batch * heads, num_tiles, dim))
    lse = launcher.empty(means, (batch * heads, num_tiles))
    coarse_attention(launcher, means, None, coarse, lse, problem.scale, chosen.coarse, chosen.precision)
    return coarse, lse
