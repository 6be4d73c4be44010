"""The whole forward, launch by launch, and the reasons why it cannot run."""

from __future__ import annotations

from collections.abc import Hashable

import torch

from ..problem import Problem
from .launch import last_dim_contiguous, launch_or_replay, mask_to_int32, remember
from .plans import Launch, Plan
from .recording import Launcher, Tensors
from .select.pool import pool
from .select.top_k import select
from .sparse.forward import context_forward, sparse_forward
from .support import this_device
from .tuning import plan


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gate: torch.Tensor | None,
    context_mask: torch.Tensor | None,
    problem: Problem,
    launch: Launch | None = None,
    *,
    output_alone: bool = False,
    call: Hashable = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Output `[B, S, H, D]`, selected tiles `[B, H, N, K]` (int32, ascending), log-sum-exp `[B, H, S]` (fp32).

    `launch` overrides the tuning table for the sparse kernel. With `output_alone` the other two are `None`: they lie in
    the workspace, which takes the host less time; `call` is then what `forward_again` finds the record of this call by.
    """
    query, key, value = (last_dim_contiguous(x) for x in (query, key, value))
    gate = None if gate is None else last_dim_contiguous(gate)
    context_mask = None if context_mask is None else mask_to_int32(context_mask)
    output = query.new_empty(query.shape)
    indices, lse = (None, None) if output_alone else _indices_and_lse(Launcher(), query, problem)

    def launch_all(launcher: Launcher, tensors: Tensors) -> None:
        query, key, value, *_ = tensors
        chosen = plan(query, problem, this_device(query), max(key.stride(1), value.stride(1)), launch)
        left = False
        for first in range(0, query.shape[2], chosen.heads):
            left |= _some_heads(launcher, tensors, problem, chosen, slice(first, first + chosen.heads))
        if left:
            query, key, value, _, output, indices, lse, context_mask = tensors
            if lse is None:
                indices, lse = _indices_and_lse(launcher, query, problem)
            context_forward(launcher, query, key, value, context_mask, indices, output, lse, problem, chosen.sparse)

    tensors = (query, key, value, gate, output, indices, lse, context_mask)
    replay = launch_or_replay("forward", tensors, problem, launch, launch_all)
    if replay is not None and call is not None:
        remember(call, tensors[:4], replay)
    return output, indices, lse


def _some_heads(launcher: Launcher, tensors: Tensors, problem: Problem, chosen: Plan, heads: slice) -> bool:
    """All kernels for some of the heads; what they need in between is free afterwards.

    Returns whether context queries are left.
    """
    *sequences, indices, lse, context_mask = tensors
    query, key, value, gate, output = launcher.slices(sequences, 2, heads)
    if lse is None:
        indices, lse = _indices_and_lse(launcher, query, problem)
    else:
        indices, lse = launcher.slices((indices, lse), 1, heads)
    tiled = chosen.sparse.layout != "direct"
    pooled = pool(launcher, query, key, value, problem, tiled=tiled, with_quarters=problem.selection == "quarters")
    lists = select(launcher, pooled, indices, problem, tiled=tiled, precision=chosen.precision, step=chosen.step)
    left, sparse = False, sparse_forward
    if chosen.sparse.programs:
        from .hopper.forward import can_specialise, hopper_forward  # needs Gluon, which not every Triton has

        if can_specialise(query, key, value, pooled, problem):
            left, sparse = problem.num_context > 0, hopper_forward
    sparse(launcher, query, key, value, gate, context_mask, pooled, lists, output, lse, problem, chosen.sparse)
    launcher.release_all()
    return left


def _indices_and_lse(launcher: Launcher, query: torch.Tensor, problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for the indices and the log-sum-exp of the heads of `query`."""
    batch, sequence, heads, _ = query.shape
    indices = launcher.empty(query, (batch, heads, problem.grid.num_tiles, problem.top_k), torch.int32)
    return indices, launcher.empty(query, (batch, heads, sequence), torch.float32)
