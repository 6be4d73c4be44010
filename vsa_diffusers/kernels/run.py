"""The whole forward in three launches, and the reasons why it cannot run."""

from __future__ import annotations

import torch
import triton

from ..torch_impl import Problem
from .attend import attend, attend_kernel
from .pool import pool
from .select import MAX_TILES, select
from .tuning import Device, Launch, device_of, plan

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_DIM = 256
INTERPRETED = not isinstance(attend_kernel, triton.runtime.JITFunction)


def why_not(query: torch.Tensor, num_tiles: int) -> str | None:
    """Why the Triton kernels cannot take `query` `[B, S, H, D]`, with what to do instead; `None` if they can."""
    if query.device.type != "cuda" and not INTERPRETED:
        return f'they need a CUDA or ROCm device, but query is on {query.device}; move it, or choose "torch".'
    if query.dtype not in DTYPES:
        return f'they take float16, bfloat16 and float32, not {query.dtype}; cast the inputs, or choose "torch".'
    if query.shape[-1] > MAX_HEAD_DIM:
        return f'they take a head_dim of at most {MAX_HEAD_DIM}, not {query.shape[-1]}; choose "torch".'
    if num_tiles > MAX_TILES:
        return f'they take at most {MAX_TILES} tiles, not {num_tiles}; choose a larger block_size, or "torch".'
    return None


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gate: torch.Tensor | None,
    context_mask: torch.Tensor | None,
    problem: Problem,
    launch: Launch | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output `[B, S, H, D]`, selected tiles `[B, H, N, K]` (int32, ascending), log-sum-exp `[B, H, S]` (fp32).

    `launch` overrides the tuning table for the sparse kernel.
    """
    query, key, value = (_dense_rows(x) for x in (query, key, value))
    gate = None if gate is None else _dense_rows(gate)
    context_mask = None if context_mask is None else context_mask.contiguous()
    batch, sequence, heads, dim = query.shape
    device = Device() if INTERPRETED else device_of(query.device.index)
    chosen = plan(query, problem, device, launch)
    tiled = chosen.attend.layout != "direct"
    output = query.new_empty((batch, sequence, heads, dim))
    indices = query.new_empty((batch, heads, problem.grid.num_tiles, problem.top_k), dtype=torch.int32)
    lse = query.new_empty((batch, heads, sequence), dtype=torch.float32)
    for first in range(0, heads, chosen.heads):
        part = slice(first, first + chosen.heads)
        whole = chosen.heads == heads
        q, k, v, g, o = (x if whole or x is None else x[:, :, part] for x in (query, key, value, gate, output))
        i, s = (x if whole else x[:, part] for x in (indices, lse))
        pooled = pool(q, k, v, problem, tiled=tiled)
        lists = select(
            pooled.means, i, problem, tiled=tiled, programs=chosen.select_programs, precision=chosen.precision
        )
        attend(q, k, v, g, context_mask, pooled, lists, o, s, problem, chosen.attend)
    return output, indices, lse


def _dense_rows(x: torch.Tensor) -> torch.Tensor:
    """The kernels take any strides but one: the elements of a head lie side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()
