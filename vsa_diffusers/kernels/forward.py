"""The whole forward in order: pool, score, top-k, sparse attention with the combine in its epilogue."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..problem import Problem
from .buffers import ForwardTensors
from .launch import is_capturing, last_dim_contiguous, launch_or_replay, mask_to_int32
from .plans import Launch, Plan
from .recording import Launcher, Tensors, form_of
from .select.pool import pool
from .select.top_k import select_tiles
from .sparse.forward import context_forward, sparse_forward
from .support import this_device
from .trial import hopper_works
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
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Output `[B, S, H, D]`, selected tiles `[B, H, N, K]` (int32, ascending), log-sum-exp `[B, H, S]` (fp32).

    `launch` overrides the tuning table for the sparse kernel. With `output_alone` the other two are `None`: they lie in
    the workspace, which takes the host less time.
    """
    query, key, value = last_dim_contiguous(query), last_dim_contiguous(key), last_dim_contiguous(value)
    gate = None if gate is None else last_dim_contiguous(gate)
    context_mask = None if context_mask is None else mask_to_int32(context_mask)
    output = query.new_empty(query.shape)
    indices, lse = (None, None) if output_alone else _indices_and_lse(Launcher(), query, problem)

    def launch_all(launcher: Launcher, tensors: Tensors) -> None:
        whole = ForwardTensors._make(tensors)
        _all_heads(launcher, whole, problem, _settled_plan(launcher, whole, problem, launch))

    tensors = ForwardTensors(query, key, value, gate, output, indices, lse, context_mask)
    launch_or_replay("forward", tensors, problem, launch, launch_all)
    return output, indices, lse


def _settled_plan(launcher: Launcher, tensors: ForwardTensors, problem: Problem, launch: Launch | None) -> Plan:
    """The plan of a call. The table's Hopper kernel is taken only where it works, which a small call finds out."""
    query, key, value = (form_of(x) for x in tensors[:3])
    device = this_device(query.device)
    chosen = plan(query, key, value, problem, device, launch)
    if chosen.hopper is None or launch is not None:
        return chosen
    masked = tensors.context_mask is not None
    works = hopper_works(query, problem, chosen.sparse, masked, _compute, is_capturing(query.device))
    if works is None:
        launcher.do_not_repeat()
    return chosen if works else plan(query, key, value, problem, replace(device, processors=0))


def _compute(tensors: ForwardTensors, problem: Problem, launch: Launch) -> None:
    """One call by itself, with the kernel that is asked for."""
    query, key, value = (form_of(x) for x in tensors[:3])
    _all_heads(Launcher(), tensors, problem, plan(query, key, value, problem, this_device(query.device), launch))


def _all_heads(launcher: Launcher, whole: ForwardTensors, problem: Problem, chosen: Plan) -> None:
    for first in range(0, whole.query.shape[2], chosen.heads):
        _some_heads(launcher, whole, problem, chosen, slice(first, first + chosen.heads))
    if chosen.context is not None:
        context_forward(launcher, _with_indices_and_lse(launcher, whole, problem), problem, chosen.context)


def _some_heads(launcher: Launcher, whole: ForwardTensors, problem: Problem, chosen: Plan, heads: slice) -> None:
    """All kernels for some of the heads; what they need in between is free afterwards."""
    tensors = _with_indices_and_lse(launcher, whole.of_heads(launcher, heads), problem)
    assert tensors.indices is not None
    pooled = pool(
        launcher,
        tensors.query,
        tensors.key,
        tensors.value,
        problem,
        tiled=chosen.sparse.reads_copy,
        warps=chosen.pool_warps,
        with_quarters=problem.selection == "quarters",
    )
    selected = select_tiles(launcher, pooled, tensors.indices, problem, chosen)
    if chosen.hopper is not None:
        from .hopper.forward import hopper_forward  # needs Gluon, which not every Triton has

        hopper_forward(launcher, tensors, pooled, selected, problem, chosen.hopper)
    else:
        sparse_forward(launcher, tensors, pooled, selected, problem, chosen.sparse)
    launcher.free_all()


def _with_indices_and_lse(launcher: Launcher, tensors: ForwardTensors, problem: Problem) -> ForwardTensors:
    """The same tensors, with room for the indices and the log-sum-exp where the caller does not want them."""
    if tensors.lse is not None:
        return tensors
    indices, lse = _indices_and_lse(launcher, tensors.query, problem)
    return tensors._replace(indices=indices, lse=lse)


def _indices_and_lse(launcher: Launcher, query: torch.Tensor, problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for the indices and the log-sum-exp of the heads of `query`."""
    batch, sequence, heads, _ = query.shape
    indices = launcher.empty(query, (batch, heads, problem.grid.num_tiles, problem.top_k), torch.int32)
    return indices, launcher.empty(query, (batch, heads, sequence), torch.float32)
