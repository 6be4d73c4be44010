"""Every number of warps, stages, blocks and registers, and the two functions that settle how a call runs.

They see forms of tensors instead of tensors, so that nothing but a call's form, its `Problem` and the device decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ..problem import Problem
from .arguments import has_boxes, power_of_two
from .plans import BackwardLaunch, BackwardPlan, BlockLaunch, HopperLaunch, Launch, Plan, TopKLaunch
from .recording import TensorForm
from .support import Device, can_describe

LAYOUTS = ("direct", "tiled", "descriptor")
# Sequences of fewer tokens do not repay the copy in tile order.
LONG_SEQUENCE = 8192
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
# The Hopper kernel, by head_dim: programs that a multiprocessor has room for, registers of a thread on average, and of
# one that fetches.
HOPPER = {64: (3, 80, 24), 128: (2, 128, 40)}
HOPPER_STAGES = 3
HOPPER_WARPS = 4
PRODUCER_WARPS = (1, 4)  # a descriptor is one thread's work, rows are copied by all
# Its programs synchronise before each of at most so many chunks of a list, of at least so many tiles on long sequences
# and on short ones.
MAX_SYNC_CHUNKS = 8
LONG_CHUNK, SHORT_CHUNK = 16, 9

# Scores are made for as many rows at a time as fit into an eighth of what key and value take in 16 bits, if not more:
# the fewer turns scores and top-k take, the more programs each of their launches has.
LEAST_WORKSPACE_BYTES = 2**26
FEW_ROWS = 16384  # of scores, which blocks of 16 spread over more programs
SCORES_OF_A_WARP = 1024  # longer rows go to several warps


def plan(
    query: TensorForm,
    key: TensorForm,
    value: TensorForm,
    problem: Problem,
    device: Device,
    launch: Launch | None = None,
) -> Plan:
    """The plan of a forward call, given the forms of `[B, S, H, D]` tensors. `launch` overrides the table's."""
    batch, _, heads, dim = query.shape
    grid, wide = problem.grid, query.dtype.itemsize > 2
    launch = launch or _forward_launch(query, problem, device, max(key.stride[1], value.stride[1]))
    hopper = _hopper_launch(query, key, value, problem, launch)
    launch = _fitted_steps(launch, problem)
    copy_bytes = 2 * batch * grid.num_tokens * heads * dim * query.dtype.itemsize
    if launch.reads_copy and copy_bytes > WHOLE_COPY_BYTES and heads > 1:
        heads = -(-heads // 2)
    few = batch * heads * grid.num_tiles < FEW_ROWS
    block_m = 16 if dim > 128 or few else 32
    return Plan(
        sparse=launch,
        hopper=hopper,
        context=replace(launch, layout="direct") if hopper and problem.num_context else None,
        heads=heads,
        precision=_precision(query, device),
        pool_warps=_pool_warps(problem, dim, launch.reads_copy),
        scores=BlockLaunch(block_m, 16 if dim > 128 else 64 if device.capability[0] == 9 else 32, warps=4, stages=2),
        quarter_scores=_quarter_scores(block_m, dim, wide),
        top_k=_top_k(grid.num_tiles),
        workspace_bytes=max(LEAST_WORKSPACE_BYTES, batch * heads * grid.num_tokens * dim // 2),
    )


def _forward_launch(query: TensorForm, problem: Problem, device: Device, token_stride: int) -> Launch:
    """The table's choice, fitted to wide tiles, 32-bit inputs and what the device can do."""
    dim = query.shape[-1]
    long, short = _rows(_TABLE, device, dim)
    is_long = _is_long(problem, token_stride)
    launch = _fitted(long if is_long else short, query, device)
    if query.dtype.itemsize <= 2 and problem.grid.tile_capacity > 64:
        launch = replace(launch, warps=8, stages=min(launch.stages, 2))
    # On short sequences it is no faster at head_dim 64, and context queries would need a launch of their own.
    pays = is_long or (dim == 128 and not problem.num_context)
    if pays and device.processors and _hopper_fits(query, problem):
        programs = HOPPER[dim][0] * device.processors
        launch = replace(launch, programs=programs, sync_chunks=sync_chunks_of(problem.top_k, is_long))
    return launch


def _hopper_launch(
    query: TensorForm, key: TensorForm, value: TensorForm, problem: Problem, launch: Launch
) -> HopperLaunch | None:
    """How the Hopper kernel runs, if it is asked for and has been written for such a call."""
    if not launch.programs or not _hopper_fits(query, problem):
        return None
    if not launch.reads_copy and not all(has_boxes(x, problem.grid) for x in (key, value)):
        return None
    _, registers, producer_registers = HOPPER[query.shape[-1]]
    return HopperLaunch(
        programs=launch.programs,
        stages=HOPPER_STAGES,
        warps=HOPPER_WARPS,
        registers=registers,
        producer_warps=PRODUCER_WARPS,
        producer_registers=producer_registers,
        sync_chunks=launch.sync_chunks,
    )


def _hopper_fits(query: TensorForm, problem: Problem) -> bool:
    """Whether the Hopper kernel has been written for such rows and tiles, wherever key and value lie."""
    return query.dtype == torch.bfloat16 and query.shape[-1] in HOPPER and 32 < problem.grid.tile_capacity <= 64


def sync_chunks_of(top_k: int, is_long: bool) -> int:
    """Into how many chunks synchronised programs divide a list of `top_k` tiles; 0 where they need not."""
    sync_chunks = min(MAX_SYNC_CHUNKS, top_k // (LONG_CHUNK if is_long else SHORT_CHUNK))
    return sync_chunks if is_long or sync_chunks > 1 else 0  # on short sequences to begin together is not worth a wait


def _pool_warps(problem: Problem, dim: int, copies: bool, backward: bool = False) -> int:
    if problem.selection == "quarters" and not backward:
        return 4 if dim > 128 else 2
    return 1 if copies else 2


def _quarter_scores(block_m: int, dim: int, wide: bool) -> BlockLaunch:
    """`block_m` counts tiles, of four rows each."""
    if wide:
        return BlockLaunch(8, 32, warps=4, stages=2)
    if dim > 128:
        return BlockLaunch(16, 32, warps=4, stages=2)
    return BlockLaunch(block_m, 128 if block_m == 16 else 64, warps=8 if block_m == 32 else 4, stages=2)


def _top_k(num_tiles: int) -> TopKLaunch:
    """A short row belongs to one warp, since the search needs sums over it."""
    keys = max(128, power_of_two(num_tiles))
    if keys <= SCORES_OF_A_WARP:
        return TopKLaunch(keys, chunk=128, list_chunk=64, warps=1)
    return TopKLaunch(keys, chunk=512, list_chunk=256, warps=max(4, keys // 1024))


# Copies above this many bytes are made for some of the heads at a time.
WHOLE_BACKWARD_COPY_BYTES = 2**27
# As `_TABLE`, for the backward pass.
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

PARTIAL_KEYS = 32  # more, in the loops beside the main one, would hold registers that it needs
POOLED_PROGRAMS = 512  # a launch of fewer programs is split


def backward_plan(
    query: TensorForm,
    read: Sequence[TensorForm],
    problem: Problem,
    device: Device,
    launch: BackwardLaunch | None = None,
) -> BackwardPlan:
    """The plan of a backward call, given the forms of the query and of all that is `read` in place.

    `launch` overrides the table's.
    """
    batch, _, heads, dim = query.shape
    grid = problem.grid
    launch = launch or backward_launch(query, problem, device, max(x.stride[1] for x in read))
    by_query, by_key = (
        _fitted_steps(replace(each, partial_keys=PARTIAL_KEYS), problem) for each in (launch.query, launch.key)
    )
    copies = 2 * (by_query.reads_copy + by_key.reads_copy)
    if copies * batch * grid.num_tokens * heads * dim * query.dtype.itemsize > WHOLE_BACKWARD_COPY_BYTES:
        heads = -(-4 * heads // (3 * copies))  # together at most four thirds of the query
    pooled = _pooled(by_key, dim)
    pooled_programs = -(-grid.num_tiles // pooled.block_m) * batch * heads
    return BackwardPlan(
        query=by_query,
        key=by_key,
        heads=heads,
        precision=_precision(query, device),
        pool_warps=_pool_warps(problem, dim, by_query.reads_copy, backward=True),
        coarse=BlockLaunch(16, 16, warps=8, stages=1) if dim > 128 else BlockLaunch(32, 32, warps=4, stages=2),
        preprocess_warps=4 if power_of_two(grid.tile_capacity) * dim <= 8192 else 8,
        rebuild=BlockLaunch(1, 64, warps=1),
        transpose=BlockLaunch(32, 64, warps=4),
        order=BlockLaunch(32, 64, warps=4),
        pooled=pooled,
        pooled_splits=max(1, min(grid.num_tiles, POOLED_PROGRAMS // pooled_programs)),
    )


def backward_launch(query: TensorForm, problem: Problem, device: Device, token_stride: int) -> BackwardLaunch:
    """The table's choice, fitted as for the forward, given the most elements between two tokens."""
    by_query, by_key = _rows(_BACKWARD_TABLE, device, query.shape[-1])
    if not _is_long(problem, token_stride):
        by_query = replace(by_query, layout="direct")
    by_query, by_key = (_fitted(each, query, device) for each in (by_query, by_key))
    if query.dtype.itemsize <= 2 and problem.grid.tile_capacity > 64:
        by_query, by_key = (replace(each, warps=8, stages=1, keys=32) for each in (by_query, by_key))
    return BackwardLaunch(by_query, by_key)


def _pooled(by_key: Launch, dim: int) -> BlockLaunch:
    """Of the pooled keys' gradients: masks take the registers that more queries a step would need."""
    queries = by_key.keys if dim <= 64 else min(by_key.keys, PARTIAL_KEYS)
    return BlockLaunch(64 if dim <= 128 else 32, queries, by_key.warps, by_key.stages, by_key.registers)


def _rows(table: dict[int, tuple[tuple[int, Launch, Launch], ...]], device: Device, dim: int) -> tuple[Launch, Launch]:
    rows = table.get(device.capability[0], table[0])
    return next((first, second) for most, first, second in rows if dim <= most)


def _fitted(launch: Launch, query: TensorForm, device: Device) -> Launch:
    """The table's launch for 32-bit inputs, and without descriptors where the device has none."""
    if launch.layout == "descriptor" and (query.dtype.itemsize > 2 or not can_describe(query, device)):
        launch = replace(launch, layout="tiled")
    return replace(launch, warps=8, stages=1, keys=16) if query.dtype.itemsize > 2 else launch


def _fitted_steps(launch: Launch, problem: Problem) -> Launch:
    """Steps of no more rows than a tile has, and of no fewer than a matrix instruction takes."""
    keys = max(16, min(launch.keys, power_of_two(problem.grid.tile_capacity)))
    return replace(launch, keys=keys, partial_keys=min(keys, launch.partial_keys))


def _precision(query: TensorForm, device: Device) -> str:
    """Of products of tile means: tf32 has 11 bits, more than 16-bit inputs have."""
    if device.capability < (8, 0):
        return "ieee"
    return "tf32" if query.dtype.itemsize == 2 else "tf32x3"


def _is_long(problem: Problem, token_stride: int) -> bool:
    """Whether the copy in tile order pays. It must be made where the direct layout cannot count a tile's elements."""
    _, height, width = problem.grid.video_shape
    reaches_far = problem.grid.block_size[0] * height * width * token_stride >= 2**31
    return reaches_far or problem.grid.num_tokens >= LONG_SEQUENCE
