"""Run a call's launches, or make recorded ones again, on the right device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable

import torch

from ..problem import Problem
from .recording import Launcher, Replay, Replays, Tensors
from .support import INTERPRETED

ALREADY_CURRENT = contextlib.nullcontext()
replays = Replays()


def launch_or_replay(
    what: str, tensors: Tensors, problem: Problem, launch: object, launch_all: Callable[[Launcher, Tensors], None]
) -> Replay | None:
    """Run `launch_all` on the device of `tensors`, or, on a GPU that has seen such a call, what it launched then.

    Returns the record, if there is one.
    """
    query = tensors[0]
    assert query is not None
    with on_device(query.device):
        if may_replay(query):
            return replays.run((what, problem, launch), tensors, launch_all)
        launch_all(Launcher(), tensors)
        return None


def repeat_forward(
    call: Hashable, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, gate: torch.Tensor | None
) -> torch.Tensor | None:
    """The output of `forward` for a call that it has recorded, without a look at anything else; `None` if it has not.

    It hits only where dtype, shape, strides, device and alignment of all tensors equal the recorded call's, and those
    needed no copy.

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


def remember(call: Hashable, given: Tensors, replay: Replay) -> None:
    """Let `repeat_forward` find `replay` for `call` and tensors of the form of those given."""
    replays.remember(call, given, replay)


def may_replay(query: torch.Tensor) -> bool:
    """Whether addresses are all that a kernel needs to be launched again."""
    return query.is_cuda and not INTERPRETED


def on_device(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device; making it current takes time even where it is already."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return ALREADY_CURRENT
    return torch.cuda.device(device)


def mask_to_int32(mask: torch.Tensor) -> torch.Tensor:
    """A mask in 32-bit words: loads of 8 bits make Triton lay out 16-bit operands a second time."""
    return mask.to(torch.int32).contiguous()


def last_dim_contiguous(x: torch.Tensor) -> torch.Tensor:
    """The kernels take any strides but one: the elements of a head lie side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()
