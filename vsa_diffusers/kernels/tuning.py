"""How the kernels are launched: a small table per architecture, looked up from shapes alone."""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass, replace

import torch

from ..torch_impl import Problem

HAS_DESCRIPTORS = importlib.util.find_spec("triton.tools.tensor_descriptor") is not None  # Triton 3.4 and later
LAYOUTS = ("direct", "tiled", "descriptor")
# A copy of key and value above this many bytes is made for half of the heads at a time.
WHOLE_COPY_BYTES = 2**28


@dataclass(frozen=True)
class Launch:
    """How the sparse kernel runs.

    Args:
        layout: where it reads key and value: `"direct"` from the inputs, `"tiled"` from a copy in tile order,
            `"descriptor"` from that copy through tensor descriptors (compute capability 9.0 or later).
        warps, stages: warps of a program, and buffers of its main loop's pipeline.
        keys: keys of one step, at most; a power of two.
        registers: most registers of a thread, so that more programs share a processor (CUDA only).
    """

    layout: str = "direct"
    warps: int = 4
    stages: int = 2
    keys: int = 64
    registers: int | None = None


@dataclass(frozen=True)
class Plan:
    """How one call runs: the sparse kernel's launch, and what the other kernels need to know of the device."""

    attend: Launch
    heads: int  # heads that go through all kernels at a time
    processors: int
    precision: str  # of the coarse scores


@dataclass(frozen=True)
class Device:
    """What the table is looked up by. `capability` is (0, 0) where it is not a CUDA device."""

    capability: tuple[int, int] = (0, 0)
    processors: int = 4
    descriptors: bool = False


# By CUDA major version (0: any other device), for 16-bit inputs: (head_dim at most, sequence long or short, launch).
_TABLE: dict[int, tuple[tuple[int, Launch, Launch], ...]] = {
    9: (
        (64, Launch("descriptor", 4, 3), Launch("direct", 4, 3)),
        (128, Launch("descriptor", 4, 2), Launch("direct", 4, 2)),
        (256, Launch("descriptor", 8, 2, 32), Launch("direct", 8, 2, 32)),
    ),
    8: (
        (128, Launch("tiled", 4, 3, 32), Launch("direct", 4, 3, 32)),
        (256, Launch("tiled", 8, 2, 32), Launch("direct", 8, 2, 32)),
    ),
    0: (  # 64 KB of shared memory
        (64, Launch("tiled", 4, 2), Launch("direct", 4, 2)),
        (128, Launch("tiled", 4, 2, 32), Launch("direct", 4, 2, 32)),
        (256, Launch("tiled", 8, 1, 32), Launch("direct", 8, 1, 32)),
    ),
}
_TABLE[10] = _TABLE[9]
_TABLE[12] = _TABLE[8]
# A list that visits fewer keys than this does not repay the copy in tile order.
LONG_LIST_KEYS = 2048


def plan(
    query: torch.Tensor, problem: Problem, device: Device, token_stride: int, launch: Launch | None = None
) -> Plan:
    """The plan for `query` `[B, S, H, D]`, given the elements between two tokens of key or value.

    `launch` overrides the table's.
    """
    batch, _, heads, dim = query.shape
    launch = launch or table_launch(query, problem, device, token_stride)
    copy_bytes = 2 * batch * problem.grid.num_tokens * heads * dim * query.element_size()
    if launch.layout != "direct" and copy_bytes > WHOLE_COPY_BYTES and heads > 1:
        heads = -(-heads // 2)
    precision = "tf32x3" if device.capability >= (8, 0) else "ieee"
    return Plan(launch, heads, device.processors, precision)


def table_launch(query: torch.Tensor, problem: Problem, device: Device, token_stride: int) -> Launch:
    """The table's choice, fitted to wide tiles, 32-bit inputs and what the device can do."""
    dim, capacity = query.shape[-1], problem.grid.tile_capacity
    rows = _TABLE.get(device.capability[0], _TABLE[0])
    long, short = next(launches for most, *launches in rows if dim <= most)
    _, height, width = problem.grid.video_shape
    # The direct layout counts the elements between a tile's first and last token in 32 bits.
    far = problem.grid.block_size[0] * height * width * token_stride >= 2**31
    launch = long if far or problem.top_k * capacity >= LONG_LIST_KEYS else short
    if launch.layout == "descriptor" and not can_describe(query, device):
        launch = replace(launch, layout="tiled")
    if query.element_size() == 4:
        return replace(launch, layout=launch.layout.replace("descriptor", "tiled"), warps=8, stages=1, keys=16)
    if capacity > 64:
        launch = replace(launch, warps=8, stages=min(launch.stages, 2))
    return launch


def power_of_two(number: int) -> int:
    """The least power of two that is at least `number`, and at least 16, the least that a matrix instruction takes."""
    return max(16, 1 << (number - 1).bit_length())


def can_describe(query: torch.Tensor, device: Device) -> bool:
    """Whether rows of `query`'s head_dim can be read through tensor descriptors on this device."""
    return device.descriptors and query.shape[-1] * query.element_size() % 16 == 0


@functools.lru_cache(maxsize=64)
def device_of(index: int) -> Device:
    """What the table needs to know of a CUDA or HIP device."""
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return Device(processors=properties.multi_processor_count)
    capability = torch.cuda.get_device_capability(index)
    return Device(capability, properties.multi_processor_count, HAS_DESCRIPTORS and capability >= (9, 0))
