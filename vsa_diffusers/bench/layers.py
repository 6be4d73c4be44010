"""One attention layer: dense, this package, and the attention of other packages where they are installed.

TFLOP/s count the products of valid tokens that the ratio asks for. Without a GPU it measures a small shape.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import peers, subjects
from .measure import Measurement, measure, this_device
from .shapes import CPU_SHAPE, SHAPES, Shape, parse

RATIOS = (0.5, 0.3, 0.2, 0.1)
COMBINES = ("gate", "merge")
ALL_COMBINES = ("gate", "sum", "sparse", "merge")
SELECTIONS = ("mean", "quarters")
DTYPES = ("bfloat16", "float16", "float32")
IMPLEMENTATIONS = ("auto", "triton", "torch")
Errors = type[Exception] | tuple[type[Exception], ...]
EXPECTED = (RuntimeError, ValueError, AssertionError)
FLOPS_OF_BOTH = 3.5  # forward and backward, in products of the forward


@dataclass(frozen=True)
class Settings:
    """What is measured of each shape.

    Args:
        ratios: `top_k_ratio`s.
        combines: ways to combine the branches.
        implementations: `None` measures the kernels on a GPU, else PyTorch's.
        block_size: `(t, h, w)` or "auto".
        selection: what key tiles are scored by.
        dtype: of the inputs on a GPU; on the CPU they are fp32.
        backward: forward and backward together.
        peers: names of `peers.PEERS`, "all" or "none"; `None` measures those that are installed, on a GPU.
    """

    ratios: Sequence[float] = RATIOS
    combines: Sequence[str] = COMBINES
    implementations: Sequence[str] | None = None
    block_size: Sequence[int] | str = (4, 4, 4)
    selection: str = "mean"
    dtype: str = "bfloat16"
    backward: bool = False
    peers: Sequence[str] | None = None


def chosen_shapes(names: Sequence[str] | None) -> list[Shape]:
    """The shapes of these names; all, or without a GPU the small one, if there are none.

    Raises:
        ValueError: a name is no shape.
    """
    if not names:
        return list(SHAPES.values()) if this_device() == "cuda" else [CPU_SHAPE]
    return [parse(name) for name in names]


def measure_shape(shape: Shape, settings: Settings) -> Iterator[dict[str, Any]]:
    """A row for each dense backend, each way to be sparse at each ratio, and the peers; what cannot run says why."""
    device = this_device()
    torch.manual_seed(0)
    dtype = getattr(torch, settings.dtype) if device == "cuda" else torch.float32
    inputs = shape.inputs(device, dtype, settings.backward)
    fastest = float("inf")
    for name, call in subjects.dense(inputs, device):
        result = _timed(call, inputs, device, settings.backward)
        if isinstance(result, Measurement):
            fastest = min(fastest, result.ms)
        yield _row(shape, name, None, result, None, settings.backward)
    for name, make in _sparse(inputs, shape, device, settings):
        for ratio in settings.ratios:
            result = _timed(make(ratio), inputs, device, settings.backward)
            yield _row(shape, name, ratio, result, fastest, settings.backward)
    for name in peers.chosen(settings.peers, device):
        yield from _peer(name, inputs, shape, device, settings, fastest)


def _sparse(
    inputs: list[torch.Tensor], shape: Shape, device: str, settings: Settings
) -> Iterator[tuple[str, Callable[[float], subjects.Call]]]:
    """What is sparse, by name: from a ratio, the call."""
    for implementation in settings.implementations or (["triton"] if device == "cuda" else ["torch"]):
        for combine in settings.combines:

            def ours(ratio: float, combine=combine, implementation=implementation) -> subjects.Call:
                choices = (combine, implementation, settings.block_size, settings.selection)
                return subjects.ours(inputs, shape, ratio, *choices)

            yield f"{implementation} {combine}", ours


def _peer(
    name: str, inputs: list[torch.Tensor], shape: Shape, device: str, settings: Settings, dense_ms: float
) -> Iterator[dict[str, Any]]:
    """The rows of a peer: one if it is dense, else one at each ratio."""
    peer = peers.PEERS[name]
    attend: Callable[[float], torch.Tensor] | str
    try:
        attend = peer.make(inputs, shape, device)
    except Exception as error:
        attend = _reason(error) if peer.is_installed else f"it is not installed: pip install {peer.package}"
    dense = peer.computes == "dense"
    for ratio in (1.0,) if dense else settings.ratios:
        result: Measurement | str
        difference = None
        if isinstance(attend, str):
            result = attend
        else:
            call = functools.partial(attend, ratio)
            result = _timed(call, inputs, device, settings.backward, Exception)
            if not isinstance(result, str) and result.rounds == [result.first_ms]:  # with what it compiled, perhaps
                result = _timed(call, inputs, device, settings.backward, Exception)
            if not isinstance(result, str) and peer.computes is not None:
                difference = _difference(call, ratio, peer.computes, inputs, shape, device)
        row = _row(shape, name, None if dense else ratio, result, dense_ms, settings.backward)
        yield row | {"peer": peer.release, "difference": difference}


def _difference(
    call: subjects.Call,
    ratio: float,
    computes: str,
    inputs: list[torch.Tensor],
    shape: Shape,
    device: str,
) -> float:
    """How far a peer's output is from the same of ours or of PyTorch, as a share of its norm."""
    if computes == "dense":
        _, same = next(iter(subjects.dense(inputs, device)))
    else:
        same = subjects.ours(inputs, shape, ratio, computes, "auto", peers.BLOCK_SIZE)
    with torch.no_grad():
        expected = same().float()
        return float((call().float() - expected).norm() / expected.norm())


def _timed(
    call: subjects.Call, inputs: list[torch.Tensor], device: str, backward: bool, errors: Errors = EXPECTED
) -> Measurement | str:
    """What it took, or why it cannot run: one of `errors`."""
    try:
        if not backward:
            with torch.no_grad():
                return measure(call, device)
        grad = torch.randn_like(call())
        return measure(lambda: torch.autograd.grad(call(), inputs, grad, allow_unused=True), device)
    except errors as error:
        return _reason(error)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _row(
    shape: Shape, what: str, ratio: float | None, result: Measurement | str, dense_ms: float | None, backward: bool
) -> dict[str, Any]:
    row = {"shape": shape.name, "what": what, "ratio": ratio, "backward": backward}
    if isinstance(result, str):
        return row | {"skipped": result}
    flops = shape.dense_flops * (1 if ratio is None else ratio) * (FLOPS_OF_BOTH if backward else 1)
    # Where no dense backend runs there is nothing to be faster than.
    speedup = None if dense_ms == float("inf") else (dense_ms or result.ms) / result.ms
    return row | {"tflops": flops / result.ms * 1e-9, "speedup": speedup, "spread": result.spread, **vars(result)}
