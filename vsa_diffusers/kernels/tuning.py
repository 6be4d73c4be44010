"""How the kernels are launched: a small table per architecture, looked up from shapes alone."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..problem import Problem
from .plans import PROGRAMS, BackwardLaunch, BackwardPlan, Launch, Plan, may_specialise
from .support import Device, can_describe

LAYOUTS = ("direct", "tiled", "descriptor")
# A copy of key and value above this many bytes is made for half of the heads at a time.
WHOLE_COPY_BYTES = 2**26


# By CUDA major version (0: any other device), for 16-bit inputs: (head_dim at most, sequence long or short, launch).
_TABLE: dict[int, tuple[tuple[int, Launch, Launch], ...]] = {
    9: (
        (64, Launch("tiled", 4, 3, 64, 128), Launch("direct", 4, 3, 64, 128)),
        (128, Launch("descriptor", 4, 3), Launch("direct", 4, 3)),
        (256, Launch("descriptor", 8, 2, 32), Launch("direct", 8, 2, 32)),
    ),
    8: (
        (128, Launch("tiled", 4, 2, 32), Launch("direct", 4, 2, 32)),
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
# Shorter sequences do not repay the copy in tile order.
LONG_SEQUENCE = 8192
# Programs of the specialised kernel wait for one another before each of at most so many parts of their lists, of at
# least so many tiles on long sequences and on short ones: then they read the same keys at about the same time.
MAX_SYNC_CHUNKS = 8
LONG_CHUNK, SHORT_CHUNK = 16, 9


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
    precision = "ieee"
    if device.capability >= (8, 0):
        # 11 bits are more than 16-bit inputs have.
        precision = "tf32" if query.element_size() == 2 else "tf32x3"
    step = 16 if dim > 128 else 64 if device.capability[0] == 9 else 32
    return Plan(launch, heads, precision, step)


def table_launch(query: torch.Tensor, problem: Problem, device: Device, token_stride: int) -> Launch:
    """The table's choice, fitted to wide tiles, 32-bit inputs and what the device can do."""
    dim, capacity = query.shape[-1], problem.grid.tile_capacity
    rows = _TABLE.get(device.capability[0], _TABLE[0])
    long, short = next(launches for most, *launches in rows if dim <= most)
    is_long = _is_long(problem, token_stride)
    # On short sequences it is no faster at head_dim 64, and context queries would need a launch of their own.
    pays = is_long or (dim == 128 and not problem.num_context)
    specialised = device.processors > 0 and may_specialise(query, problem) and pays
    launch = long if is_long else short
    if launch.layout == "descriptor" and not can_describe(query, device):
        launch = replace(launch, layout="tiled")
    if query.element_size() == 4:
        return replace(launch, layout=launch.layout.replace("descriptor", "tiled"), warps=8, stages=1, keys=16)
    if capacity > 64:
        launch = replace(launch, warps=8, stages=min(launch.stages, 2))
    if specialised:
        sync_chunks = sync_chunks_of(problem.top_k, is_long)
        launch = replace(launch, programs=PROGRAMS[dim] * device.processors, sync_chunks=sync_chunks)
    return launch


def sync_chunks_of(top_k: int, is_long: bool) -> int:
    """Into how many parts programs that keep in step divide a list of `top_k` tiles; 0 where they need not."""
    sync_chunks = min(MAX_SYNC_CHUNKS, top_k // (LONG_CHUNK if is_long else SHORT_CHUNK))
    return sync_chunks if is_long or sync_chunks > 1 else 0  # on short sequences to begin together is not worth a wait


# Copies above this many bytes are made for some of the heads at a time.
WHOLE_BACKWARD_COPY_BYTES = 2**27
# As `_TABLE`, for the backward pass; `keys` counts queries where the kernel walks those.
_BACKWARD_TABLE: dict[int, tuple[tuple[int, Launch, Launch], ...]] = {
    9: (
        (64, Launch("descriptor", 4, 2), Launch("descriptor", 4, 2)),
        (128, Launch("descriptor", 4, 2), Launch("descriptor", 4, 2)),
        (256, Launch("descriptor", 8, 2, 32), Launch("descriptor", 8, 1, 32)),
    ),
    8: (
        (64, Launch("tiled", 4, 2, 32), Launch("tiled", 4, 2, 32)),
        (128, Launch("tiled", 4, 3, 32), Launch("tiled", 8, 2, 32)),
        (256, Launch("tiled", 8, 1, 32), Launch("tiled", 8, 1, 16)),
    ),
    0: (
        (64, Launch("tiled", 4, 1, 32), Launch("tiled", 4, 1, 32)),
        (128, Launch("tiled", 4, 1, 32), Launch("tiled", 8, 1, 32)),
        (256, Launch("tiled", 8, 1, 16), Launch("tiled", 8, 1, 16)),
    ),
}
_BACKWARD_TABLE[10] = _BACKWARD_TABLE[9]
_BACKWARD_TABLE[12] = _BACKWARD_TABLE[8]


def backward_plan(
    query: torch.Tensor, problem: Problem, device: Device, token_stride: int, launch: BackwardLaunch | None = None
) -> BackwardPlan:
    """The plan of a backward call, given the most elements between two tokens of a tensor that is read in place.

    `launch` overrides the table's.
    """
    batch, _, heads, dim = query.shape
    launch = launch or backward_launch(query, problem, device, token_stride)
    copies = 2 * ((launch.query.layout != "direct") + (launch.key.layout != "direct"))
    if copies * batch * problem.grid.num_tokens * heads * dim * query.element_size() > WHOLE_BACKWARD_COPY_BYTES:
        heads = -(-4 * heads // (3 * copies))  # together at most four thirds of the query
    precision = "ieee"
    if device.capability >= (8, 0):  # tf32 is closer than the rounding of 16-bit gradients
        precision = "tf32" if query.element_size() == 2 else "tf32x3"
    return BackwardPlan(launch.query, launch.key, heads, precision)


def backward_launch(query: torch.Tensor, problem: Problem, device: Device, token_stride: int) -> BackwardLaunch:
    """The table's choice, fitted as in `table_launch`."""
    dim, capacity = query.shape[-1], problem.grid.tile_capacity
    rows = _BACKWARD_TABLE.get(device.capability[0], _BACKWARD_TABLE[0])
    launches = next(pair for most, *pair in rows if dim <= most)
    if not _is_long(problem, token_stride):
        launches[0] = replace(launches[0], layout="direct")
    fitted = []
    for launch in launches:
        if launch.layout == "descriptor" and not can_describe(query, device):
            launch = replace(launch, layout="tiled")
        if query.element_size() == 4:
            launch = replace(launch, layout=launch.layout.replace("descriptor", "tiled"), warps=8, stages=1, keys=16)
        elif capacity > 64:
            launch = replace(launch, warps=8, stages=1, keys=32)
        fitted.append(launch)
    return BackwardLaunch(*fitted)


def _is_long(problem: Problem, token_stride: int) -> bool:
    """Whether the copy in tile order pays. It must be made where the direct layout cannot count a tile's elements."""
    _, height, width = problem.grid.video_shape
    reaches_far = problem.grid.block_size[0] * height * width * token_stride >= 2**31
    return reaches_far or problem.grid.num_tokens >= LONG_SEQUENCE
