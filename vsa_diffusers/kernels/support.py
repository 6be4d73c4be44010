"""What can run where, and why not."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton

from .primitives.geometry import tile_box
from .recording import TensorForm
from .select.top_k import MAX_TILES

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_DIM = 256
MIN_TRITON = (3, 6)  # the earliest release whose interpreter agrees with fp64 throughout
HAS_DESCRIPTORS = importlib.util.find_spec("triton.tools.tensor_descriptor") is not None  # Triton 3.4 and later
INTERPRETED = not isinstance(tile_box, triton.runtime.JITFunction)


@dataclass(frozen=True)
class Device:
    """What the table is looked up by. `capability` is (0, 0) where it is not a CUDA device."""

    capability: tuple[int, int] = (0, 0)
    descriptors: bool = False
    processors: int = 0  # multiprocessors of one for which the Hopper kernel is written, else 0


@functools.lru_cache(maxsize=64)
def device_of(index: int) -> Device:
    """What the table needs to know of a CUDA or HIP device."""
    if torch.version.hip:
        return Device()
    capability = torch.cuda.get_device_capability(index)
    properties = torch.cuda.get_device_properties(index)
    return Device(
        capability,
        HAS_DESCRIPTORS and capability >= (9, 0),
        processors=properties.multi_processor_count if capability[0] == 9 else 0,
    )


def this_device(device: torch.device) -> Device:
    """`device` as the tuning table knows it."""
    return Device() if INTERPRETED else device_of(device.index)


def can_describe(query: torch.Tensor | TensorForm, device: Device) -> bool:
    """Whether rows of `query`'s head_dim can be read through tensor descriptors on this device."""
    return device.descriptors and query.shape[-1] * query.dtype.itemsize % 16 == 0


@functools.lru_cache(maxsize=1)
def is_recent_triton() -> bool:
    """Whether the installed Triton is one that the kernels are known to be right on."""
    return tuple(int(part) for part in triton.__version__.split(".")[:2]) >= MIN_TRITON


def unsupported_reason(query: torch.Tensor, num_tiles: int) -> tuple[str, str] | None:
    """Why the Triton kernels cannot take `query` `[B, S, H, D]`: the kind of the reason, and the reason with what to do
    instead; `None` if they can."""
    return next(_obstacles(query, num_tiles), None)


def _obstacles(query: torch.Tensor, num_tiles: int) -> Iterator[tuple[str, str]]:
    if not is_recent_triton():
        least = ".".join(map(str, MIN_TRITON))
        yield "release", f'they need Triton {least} or later, not {triton.__version__}; upgrade, or choose "torch".'
    if query.device.type != "cuda" and not INTERPRETED:
        yield "device", f'they need a CUDA or ROCm device, but query is on {query.device}; move it, or choose "torch".'
    elif (0, 0) < (capability := this_device(query.device).capability) < (8, 0):
        yield "capability", f'they need a GPU of compute capability 8.0 or later, not {capability}; choose "torch".'
    if query.dtype not in DTYPES:
        yield (
            "dtype",
            f'they take float16, bfloat16 and float32, not {query.dtype}; cast the inputs, or choose "torch".',
        )
    if query.shape[-1] > MAX_HEAD_DIM:
        yield "head_dim", f'they take a head_dim of at most {MAX_HEAD_DIM}, not {query.shape[-1]}; choose "torch".'
    if num_tiles > MAX_TILES:
        yield "tiles", f'they take at most {MAX_TILES} tiles, not {num_tiles}; choose a larger block_size, or "torch".'
