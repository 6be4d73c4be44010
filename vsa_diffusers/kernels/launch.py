"""Run a call's launches, or make recorded ones again, on the right device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch

from ..problem import Problem
from .recording import Launcher, Replays, Tensors
from .support import INTERPRETED

ALREADY_CURRENT = contextlib.nullcontext()
replays = Replays()


def launch_or_replay(
    what: str, tensors: Tensors, problem: Problem, launch: object, launch_all: Callable[[Launcher, Tensors], None]
) -> None:
    """Run `launch_all` on the device of `tensors`, or, on a GPU that has seen such a call, what it launched then."""
    query = tensors[0]
    assert query is not None
    with on_device(query.device):
        if may_replay(query):
            replays.run((what, problem, launch), tensors, launch_all)
        else:
            launch_all(Launcher(), tensors)


def may_replay(query: torch.Tensor) -> bool:
    """Whether addresses are all that a kernel needs to be launched again."""
    return query.is_cuda and not INTERPRETED


def is_capturing(device: torch.device) -> bool:
    """Whether launches go into a CUDA graph instead of being run."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


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
