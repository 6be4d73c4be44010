"""Cases for the Triton kernels and the checks that each one passes, shared by the interpreter and the GPU."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from oracle import SCORES, attention, relative_error
from vsa_diffusers.kernels import backward, forward
from vsa_diffusers.kernels import launch as launching
from vsa_diffusers.kernels.plans import BackwardLaunch, Launch
from vsa_diffusers.problem import Problem
from vsa_diffusers.tiles import TileGrid

# (dtype, relative error against fp64)
TOLERANCES = {torch.float32: 1e-5, torch.float16: 1.5e-3, torch.bfloat16: 1e-2}
GRADIENTS = ("query", "key", "value", "gate")


@dataclass(frozen=True)
class Case:
    """One call. `spread` multiplies query and key, so the logits grow with its square."""

    video_shape: tuple[int, int, int] = (5, 6, 7)
    block_size: tuple[int, int, int] = (4, 4, 4)
    top_k: int = 3
    combine: str = "sparse"
    batch: int = 1
    heads: int = 1
    head_dim: int = 32
    dtype: torch.dtype = torch.float32
    before: int = 0
    after: int = 0
    masked: bool = False
    spread: float = 1.0
    layout: str = "direct"
    transposed: bool = False
    tolerance: float | None = None
    selection: str = "mean"
    programs: int = 0
    sync_chunks: int = 0

    def __str__(self) -> str:
        changed = {k: v for k, v in vars(self).items() if v != getattr(Case(), k)}
        return "-".join(f"{k}={v}".replace(" ", "").replace("torch.", "") for k, v in changed.items()) or "default"

    @property
    def problem(self) -> Problem:
        grid = TileGrid(self.video_shape, self.block_size)
        top_k = min(self.top_k, grid.num_tiles)
        return Problem(grid, top_k, self.combine, self.head_dim**-0.5, self.before, self.after, self.selection)

    @property
    def backward_launch(self) -> BackwardLaunch:
        launch = replace(self.launch, stages=1, keys=16 if self.head_dim > 128 else 32)
        return BackwardLaunch(launch, replace(launch, warps=8))

    @property
    def launch(self) -> Launch:
        wide = self.dtype == torch.float32 or self.head_dim > 128 or math.prod(self.block_size) > 64
        form = (8, 1, 32) if wide else (4, 2, 64)
        return Launch(self.layout, *form, programs=self.programs, sync_chunks=self.sync_chunks)

    def inputs(self, device: str = "cpu"):
        """Query, key, value, gate and context mask; views of wider tensors if `transposed`."""
        sequence = math.prod(self.video_shape) + self.before + self.after
        shape = (self.batch, sequence, self.heads, self.head_dim)
        tensors = [torch.randn(shape, device=device) for _ in range(4)]
        tensors = [x * self.spread if i < 2 else x for i, x in enumerate(tensors)]
        tensors = [x.to(self.dtype) for x in tensors]
        if self.transposed:  # [B, H, S, D] in memory, two of them side by side
            tensors = [torch.cat([x, x], 3).transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
            tensors = [x[..., : self.head_dim] for x in tensors]
        mask = None
        if self.masked:
            mask = torch.rand(self.batch, self.before + self.after, device=device) > 0.4
            mask[0] = False
        gate = tensors[3] if self.combine == "gate" else None
        return *tensors[:3], gate, mask


MODES = ("gate", "sum", "sparse", "merge")
JOINT = Case(combine="merge", before=3, after=18, masked=True, batch=2)

MODE_CASES = [Case(combine=combine, heads=2) for combine in MODES]
MODE_CASES += [Case(combine=combine, batch=2, layout="tiled") for combine in MODES]
SHAPE_CASES = [
    Case(video_shape=(4, 8, 8), top_k=2, combine="merge"),
    Case(video_shape=(5, 5, 9), top_k=5, combine="merge", layout="tiled"),
    Case(video_shape=(1, 7, 13), top_k=3, combine="gate"),
    Case(video_shape=(3, 2, 2), top_k=1, combine="gate"),
    Case(video_shape=(4, 9, 5), block_size=(3, 5, 4), combine="merge"),
    Case(video_shape=(6, 5, 8), block_size=(3, 5, 4), top_k=2, combine="merge", layout="tiled", before=2),
    Case(video_shape=(5, 7, 9), block_size=(4, 4, 8), top_k=2, combine="sum"),
    Case(video_shape=(4, 5, 17), block_size=(2, 5, 10), top_k=2, combine="merge", layout="tiled", after=5),
    Case(video_shape=(5, 4, 3), block_size=(2, 3, 1), top_k=9, combine="merge"),
    Case(video_shape=(5, 6, 7), top_k=99, combine="merge"),
    Case(video_shape=(5, 9, 9), block_size=(1, 3, 3), top_k=7, combine="gate"),
]
CONTEXT_CASES = [
    JOINT,
    replace(JOINT, layout="tiled", heads=2),
    replace(JOINT, combine="gate", before=0, masked=False),
    replace(JOINT, combine="sum", after=0, before=70, layout="tiled", batch=1),
    replace(JOINT, combine="sparse", before=65, after=66, video_shape=(5, 5, 5)),
]
DESCRIPTOR_CASES = [
    replace(JOINT, layout="descriptor", batch=1),
    Case(video_shape=(6, 5, 8), block_size=(3, 5, 4), top_k=2, combine="gate", layout="descriptor", before=2),
]
DIM_CASES = [
    Case(combine="merge" if dim % 64 else "gate", head_dim=dim, dtype=dtype, video_shape=(5, 5, 6), before=2)
    for dim, dtype in (
        (40, torch.float16),
        (64, torch.bfloat16),
        (72, torch.bfloat16),
        (96, torch.float16),
        (128, torch.bfloat16),
        (256, torch.bfloat16),
        (256, torch.float32),
        (33, torch.float32),
    )
]
STRIDE_CASES = [
    Case(combine="gate", transposed=True, batch=2, heads=2),
    Case(combine="merge", transposed=True, layout="tiled", heads=2, after=4, dtype=torch.bfloat16, head_dim=64),
]
SPREAD_CASES = [
    Case(combine=combine, spread=spread, dtype=dtype, tolerance=tolerance)
    for combine in ("gate", "merge")
    for spread, dtype, tolerance in (
        (4.0, torch.bfloat16, None),
        (16.0, torch.bfloat16, None),
        (4.0, torch.float32, 1e-4),
        (16.0, torch.float32, 1e-3),
    )
]

QUARTER_CASES = [replace(case, selection="quarters") for case in (*MODE_CASES[::3], *SHAPE_CASES, *DIM_CASES)]
QUARTER_CASES += [
    Case(selection="quarters", video_shape=(5, 9, 9), block_size=(4, 4, 4), heads=2, batch=2, combine="gate"),
    Case(selection="quarters", video_shape=(2, 9, 21), block_size=(2, 1, 10), top_k=7, combine="merge", after=3),
    Case(selection="quarters", video_shape=(2, 9, 12), block_size=(2, 4, 1), top_k=9, before=2),
    Case(selection="quarters", spread=4.0, dtype=torch.bfloat16, combine="merge", layout="tiled"),
    Case(selection="quarters", video_shape=(4, 8, 9), head_dim=128, dtype=torch.bfloat16, combine="merge", heads=2),
    Case(selection="quarters", spread=16.0, tolerance=1e-3, transposed=True, heads=2),
]


def expected(query, key, value, gate, mask, indices, problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """Output `[B, S, H, D]` and log-sum-exp `[B, H, S]` in fp64 from dense masks, given the tiles that were kept."""
    grid = problem.grid
    shape = (*indices.shape[:3], grid.num_tiles)
    kept = torch.zeros(shape, dtype=torch.bool, device=query.device).scatter_(3, indices.long(), True)
    form = {"block_size": grid.block_size, "combine": problem.combine, "scale": problem.scale, "before": problem.before}
    return attention(query, key, value, gate, mask, kept, grid.video_shape, **form)


def check_indices(query, key, indices, problem: Problem) -> None:
    """Ascending, distinct, and no tile left out scores higher than one kept by more than the products can tell.

    16-bit inputs are multiplied with 11 bits, their quarters with as many as they have themselves.
    """
    grid = problem.grid
    assert indices.dtype == torch.int32
    assert indices.shape == (query.shape[0], query.shape[2], grid.num_tiles, problem.top_k)
    assert indices.min() >= 0
    assert indices.max() < grid.num_tiles
    assert (indices.diff(dim=-1) > 0).all()
    scores = SCORES[problem.selection](
        query, key, grid.video_shape, grid.block_size, scale=problem.scale, before=problem.before
    )
    kept = torch.zeros_like(scores).scatter_(3, indices.long(), 1) > 0
    lowest = scores.masked_fill(~kept, math.inf).amin(-1)
    highest = scores.masked_fill(kept, -math.inf).amax(-1)
    tolerance = 1e-5 if query.dtype == torch.float32 else 1e-3
    if problem.selection == "quarters" and query.dtype == torch.bfloat16:
        tolerance = 8e-3
    assert (highest - lowest).max() <= tolerance * scores.abs().max()


@contextlib.contextmanager
def memory_full_of_nan(device: str):
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills new memory with NaN
    try:
        assert torch.empty(1, device=device).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def check(case: Case, device: str = "cpu", launch: Launch | None = None) -> None:
    """Run the case over memory full of NaN and compare everything it returns with fp64.

    Another call like it comes first, so that a GPU is checked on launches that are made again.
    """
    if launching.may_replay(case.inputs(device)[0]):
        forward(*case.inputs(device), case.problem, launch or case.launch)
    query, key, value, gate, mask = case.inputs(device)
    with memory_full_of_nan(device):
        output, indices, lse = forward(query, key, value, gate, mask, case.problem, launch or case.launch)
    check_indices(query, key, indices, case.problem)
    right, right_lse = expected(query, key, value, gate, mask, indices, case.problem)
    tolerance = case.tolerance or TOLERANCES[case.dtype]
    assert output.dtype == case.dtype
    assert output.shape == query.shape
    assert relative_error(output, right) < tolerance
    assert relative_error(lse, right_lse) < max(tolerance / 10, 2e-6)


def expected_gradients(grad_output, query, key, value, gate, mask, indices, problem: Problem) -> list[torch.Tensor]:
    """Gradients of query, key, value and gate (if there is one) in fp64, by autograd through `expected`."""
    given = [None if x is None else x.detach().double().requires_grad_() for x in (query, key, value, gate)]
    output, _ = expected(*given, mask, indices, problem)
    return list(torch.autograd.grad(output, [x for x in given if x is not None], grad_output.double()))


def check_gradients(case: Case, device: str = "cpu", launch: BackwardLaunch | None = None) -> None:
    """Run the case's backward pass over memory full of NaN and compare every gradient with fp64, as `check` does."""

    def ready():
        query, key, value, gate, mask = case.inputs(device)
        output, indices, lse = forward(query, key, value, gate, mask, case.problem, case.launch)
        return (torch.randn_like(output), query, key, value, gate, mask, indices), lse, output

    if launching.may_replay(case.inputs(device)[0]):
        given, lse, output = ready()
        backward(*given, lse, output, case.problem, launch or case.backward_launch)
    given, lse, output = ready()
    _, query, _, _, gate, _, _ = given
    with memory_full_of_nan(device):
        grads = backward(*given, lse, output, case.problem, launch or case.backward_launch)
    assert (grads[3] is None) == (gate is None)
    right = expected_gradients(*given, case.problem)
    tolerance = case.tolerance or TOLERANCES[case.dtype]
    for name, ours, exact in zip(GRADIENTS, grads, right, strict=False):
        assert ours.dtype == case.dtype
        assert ours.shape == query.shape
        error = relative_error(ours, exact)
        assert error < tolerance, f"gradient of {name}: {error}"


def check_output_alone(case: Case, device: str = "cpu") -> None:
    """A caller that wants nothing but the output gets the same, the second time, too."""
    for _ in range(2):
        arguments = (*case.inputs(device), case.problem, case.launch)
        output, *others = forward(*arguments, output_alone=True)
        assert others == [None, None]
        assert torch.equal(output, forward(*arguments)[0])


def check_chunk_sync(case: Case, sync_chunks: Sequence[int], device: str = "cpu") -> None:
    """Programs that wait for one another before each of so many parts of their lists compute the same bits."""
    arguments = (*case.inputs(device), case.problem)
    alone, *others = (forward(*arguments, replace(case.launch, sync_chunks=count)) for count in (0, *sync_chunks))
    assert alone[0].isfinite().all()
    for other in others:
        assert all(torch.equal(x, y) for x, y in zip(alone, other, strict=True))


def check_rows_far_below_their_bound(combine: str, device: str = "cpu", **changed) -> None:
    """Logits that lie where their norms allow, but on the far side: weights vanish there and must be had again."""
    case = replace(Case(combine=combine, head_dim=64, dtype=torch.bfloat16, heads=2), **changed)
    query, key, value, gate, mask = case.inputs(device)
    size = 3.4 * (64 / case.head_dim) ** 0.25
    query, key = (0.1 * query + size).to(query.dtype), (0.1 * key - size).to(key.dtype)
    max_norm = [x.float().norm(dim=-1).max() for x in (query, key)]
    bound = float(max_norm[0] * max_norm[1] * case.problem.scale / math.log(2))
    assert 120 < bound < 180
    output, indices, lse = forward(query, key, value, gate, mask, case.problem, case.launch)
    right, right_lse = expected(query, key, value, gate, mask, indices, case.problem)
    assert float(right_lse.max()) / math.log(2) < 90 - bound  # weights of at most 2**(logit - (bound - 90)) < 2**-126
    assert relative_error(output, right) < TOLERANCES[case.dtype]
    assert relative_error(lse, right_lse) < TOLERANCES[case.dtype] / 10


def some(values: Iterable[Any], first: int = 0, every: int = 1) -> list[Any]:
    """As parameters, all slow but those from `first` on at steps of `every`: each takes seconds, and there are many."""
    return [
        value if place >= first and (place - first) % every == 0 else pytest.param(value, marks=pytest.mark.slow)
        for place, value in enumerate(values)
    ]
