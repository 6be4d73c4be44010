"""The whole forward, launch by launch, and the reasons why it cannot run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator

import torch
import triton

from ..problem import Problem
from .attend import attend, attend_from_context, attend_kernel
from .pool import pool
from .replay import Replay, Replays, Tensors, Work
from .select import MAX_TILES, select
from .tuning import Device, Launch, Plan, device_of, plan

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_DIM = 256
MIN_TRITON = (3, 6)  # the earliest release whose interpreter agrees with fp64 throughout
INTERPRETED = not isinstance(attend_kernel, triton.runtime.JITFunction)
ALREADY_CURRENT = contextlib.nullcontext()
replays = Replays()


def is_recent_triton() -> bool:
    """Whether the installed Triton is one that the kernels are known to be right on."""
    return tuple(int(part) for part in triton.__version__.split(".")[:2]) >= MIN_TRITON


def why_not(query: torch.Tensor, num_tiles: int) -> str | None:
    """Why the Triton kernels cannot take `query` `[B, S, H, D]`, with what to do instead; `None` if they can."""
    return next(_obstacles(query, num_tiles), None)


def _obstacles(query: torch.Tensor, num_tiles: int) -> Iterator[str]:
    if not is_recent_triton():
        least = ".".join(map(str, MIN_TRITON))
        yield f'they need Triton {least} or later, not {triton.__version__}; upgrade, or choose "torch".'
    if query.device.type != "cuda" and not INTERPRETED:
        yield f'they need a CUDA or ROCm device, but query is on {query.device}; move it, or choose "torch".'
    elif (0, 0) < (capability := this_device(query).capability) < (8, 0):
        yield f'they need a GPU of compute capability 8.0 or later, not {capability}; choose "torch".'
    if query.dtype not in DTYPES:
        yield f'they take float16, bfloat16 and float32, not {query.dtype}; cast the inputs, or choose "torch".'
    if query.shape[-1] > MAX_HEAD_DIM:
        yield f'they take a head_dim of at most {MAX_HEAD_DIM}, not {query.shape[-1]}; choose "torch".'
    if num_tiles > MAX_TILES:
        yield f'they take at most {MAX_TILES} tiles, not {num_tiles}; choose a larger block_size, or "torch".'


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
    query, key, value = (dense_rows(x) for x in (query, key, value))
    gate = None if gate is None else dense_rows(gate)
    context_mask = None if context_mask is None else words_of(context_mask)
    output = query.new_empty(query.shape)
    indices, lse = (None, None) if output_alone else _indices_and_lse(Work(), query, problem)

    def launch_all(work: Work, tensors: Tensors) -> None:
        query, key, value, *_ = tensors
        chosen = plan(query, problem, this_device(query), max(key.stride(1), value.stride(1)), launch)
        left = False
        for first in range(0, query.shape[2], chosen.heads):
            left |= _some_heads(work, tensors, problem, chosen, slice(first, first + chosen.heads))
        if left:
            query, key, value, _, output, indices, lse, context_mask = tensors
            if lse is None:
                indices, lse = _indices_and_lse(work, query, problem)
            attend_from_context(work, query, key, value, context_mask, indices, output, lse, problem, chosen.attend)

    tensors = (query, key, value, gate, output, indices, lse, context_mask)
    replay = launch_or_replay("forward", tensors, problem, launch, launch_all)
    if replay is not None and call is not None:
        replays.remember(call, tensors[:4], replay)
    return output, indices, lse


def forward_again(
    call: Hashable, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, gate: torch.Tensor | None
) -> torch.Tensor | None:
    """The output of `forward` for a call that it has recorded, without a look at anything else; `None` if it has not.

    The tensors are the caller's own. Found are those of the form of what `forward` launched on, which need no copy.

    Args:
        call: what `forward` was given as such, with `output_alone` and without a mask. Together with the tensors' form
            it decides the problem.
    """
    given = (query, key, value, gate)
    try:
        replay = replays.find(call, given)
    except RuntimeError:  # of tensors without strides or memory
        return None
    if replay is None or not may_replay(query):
        return None
    output = query.new_empty(query.shape)
    with on_device(query.device):
        replay.run((*given, output, None, None, None))
    return output


def launch_or_replay(
    what: str, tensors: Tensors, problem: Problem, launch: object, launch_all: Callable[[Work, Tensors], None]
) -> Replay | None:
    """Run `launch_all` on the device of `tensors`, or, on a GPU that has seen such a call, what it launched then.

    Returns the record, if there is one.
    """
    query = tensors[0]
    assert query is not None
    with on_device(query.device):
        if may_replay(query):
            return replays.run((what, problem, launch), tensors, launch_all)
        launch_all(Work(), tensors)
        return None


def may_replay(query: torch.Tensor) -> bool:
    """Whether addresses are all that a kernel needs to be launched again."""
    return query.is_cuda and not INTERPRETED


def words_of(mask: torch.Tensor) -> torch.Tensor:
    """A mask in 32-bit words: loads of 8 bits make Triton lay out 16-bit operands a second time."""
    return mask.to(torch.int32).contiguous()


def on_device(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device; making it current takes time even where it is already."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return ALREADY_CURRENT
    return torch.cuda.device(device)


def _some_heads(work: Work, tensors: Tensors, problem: Problem, chosen: Plan, heads: slice) -> bool:
    """All kernels for some of the heads; what they need in between is free afterwards.

    Returns whether context queries are left.
    """
    *sequences, indices, lse, context_mask = tensors
    query, key, value, gate, output = work.parts(sequences, 2, heads)
    if lse is None:
        indices, lse = _indices_and_lse(work, query, problem)
    else:
        indices, lse = work.parts((indices, lse), 1, heads)
    tiled = chosen.attend.layout != "direct"
    pooled = pool(work, query, key, value, problem, tiled=tiled, parts=problem.selection == "quarters")
    lists = select(work, pooled, indices, problem, tiled=tiled, precision=chosen.precision, step=chosen.step)
    left = attend(work, query, key, value, gate, context_mask, pooled, lists, output, lse, problem, chosen.attend)
    work.end_part()
    return left


def _indices_and_lse(work: Work, query: torch.Tensor, problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for the indices and the log-sum-exp of the heads of `query`."""
    batch, sequence, heads, _ = query.shape
    indices = work.empty(query, (batch, heads, problem.grid.num_tiles, problem.top_k), torch.int32)
    return indices, work.empty(query, (batch, heads, sequence), torch.float32)


def this_device(x: torch.Tensor) -> Device:
    """The device of `x`, as the tuning table knows it."""
    return Device() if INTERPRETED else device_of(x.device.index)


def dense_rows(x: torch.Tensor) -> torch.Tensor:
    """The kernels take any strides but one: the elements of a head lie side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()
