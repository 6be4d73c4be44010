"""The whole backward pass: what it recomputes, in which order its kernels run, and for how many heads at a time."""

from __future__ import annotations

import torch

from ..problem import Problem
from .launch import last_dim_contiguous, launch_or_replay, mask_to_int32
from .plans import BackwardLaunch, BackwardPlan
from .recording import Launcher, Tensors
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
        query, key, value, _, _, grad_output, *_ = tensors
        token_stride = max(x.stride(1) for x in (query, key, value, grad_output))
        chosen = backward_plan(query, problem, this_device(query), token_stride, launch)
        for first in range(0, query.shape[2], chosen.heads):
            _some_heads(launcher, tensors, problem, chosen, slice(first, first + chosen.heads))

    tensors = (query, key, value, gate, output, grad_output, *grads[:3], grad_gate, indices, lse, context_mask)
    launch_or_replay("backward", tensors, problem, launch, launch_all)
    return (*grads[:3], grad_gate)


def _some_heads(launcher: Launcher, tensors: Tensors, problem: Problem, chosen: BackwardPlan, heads: slice) -> None:
    """All kernels for some of the heads; what they need in between is free afterwards."""
    *sequences, indices, lse, context_mask = tensors
    sequences = launcher.slices(sequences, 2, heads)
    query, key, value, gate, output, grad_output, grad_query, grad_key, grad_value, grad_gate = sequences
    indices, lse = launcher.slices((indices, lse), 1, heads)
    keys_tiled, queries_tiled = (x.layout != "direct" for x in (chosen.query, chosen.key))
    pooled = pool(launcher, query, key, value, problem, tiled=keys_tiled)
    coarse = None
    if problem.has_coarse:
        coarse, coarse_lse = coarse_attention(launcher, pooled.means, problem.scale, chosen.precision)
    preprocessed = backward_preprocess(
        launcher, query, output, grad_output, gate, coarse, lse, grad_gate, problem, tiled=queries_tiled
    )
    query_lists = rebuild_lists(launcher, indices, pooled.boxes, problem, tiled=keys_tiled)
    grad_mean_query = grad_mean_kv = None
    if problem.has_coarse:
        grad_mean_query, grad_mean_kv = coarse_gradients(
            launcher, pooled.means, coarse_lse, preprocessed, problem.scale, chosen.precision
        )
    elif problem.combine == "merge" and problem.top_k < problem.grid.num_tiles:
        grad_mean_kv = pooled_dkdv(
            launcher, query, grad_output, pooled, preprocessed, query_lists.selected_bits, problem, chosen.key
        )
    dq(
        launcher,
        query,
        key,
        value,
        grad_output,
        context_mask,
        pooled,
        preprocessed,
        query_lists,
        grad_mean_query,
        grad_query,
        problem,
        chosen.query,
    )
    # The lists of the key tiles take the room of these.
    launcher.free(*pooled, query_lists.full_tile_starts, query_lists.partial_groups, query_lists.list_lengths)
    if problem.has_coarse:
        launcher.free(coarse, coarse_lse, preprocessed.grad_coarse, preprocessed.coarse_delta, grad_mean_query)
    selected_bits = query_lists.selected_bits
    del pooled, query_lists
    key_lists = transpose_lists(launcher, selected_bits, problem, tiled=queries_tiled)
    dkdv(
        launcher,
        query,
        key,
        value,
        grad_output,
        context_mask,
        preprocessed,
        key_lists,
        grad_mean_kv,
        grad_key,
        grad_value,
        problem,
        chosen.key,
    )
    launcher.release_all()
