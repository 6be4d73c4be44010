"""The forward pass against fp64, in a process of its own (`conftest.py`)."""

import pytest
import torch

from checks import (
    CONTEXT_CASES,
    DESCRIPTOR_CASES,
    DIM_CASES,
    JOINT,
    MODE_CASES,
    QUARTER_CASES,
    SHAPE_CASES,
    SPREAD_CASES,
    STRIDE_CASES,
    Case,
    check,
    check_indices,
    check_rows_far_below_their_bound,
    some,
)
from oracle import relative_error
from vsa_diffusers import video_sparse_attention
from vsa_diffusers.kernels import forward, tuning
from vsa_diffusers.kernels.plans import Launch
from vsa_diffusers.kernels.recording import Launcher, form_of
from vsa_diffusers.kernels.select import coarse, top_k
from vsa_diffusers.kernels.select.pool import pool
from vsa_diffusers.kernels.support import HAS_DESCRIPTORS, Device
from vsa_diffusers.problem import Problem
from vsa_diffusers.tiles import TileGrid


@pytest.mark.parametrize(
    "case", [*MODE_CASES[:4], *some([*MODE_CASES[4:], *SHAPE_CASES, *CONTEXT_CASES], every=5)], ids=str
)
def test_every_mode_and_shape_matches_fp64(case):
    check(case)


@pytest.mark.skipif(not HAS_DESCRIPTORS, reason="runs with Triton 3.6 or later: pip install 'triton>=3.6'")
@pytest.mark.parametrize("case", DESCRIPTOR_CASES, ids=str)
def test_tensor_descriptors_match_fp64(case):
    check(case)


@pytest.mark.parametrize("case", some([*DIM_CASES, *STRIDE_CASES, *SPREAD_CASES], every=5), ids=str)
def test_every_head_dimension_dtype_stride_and_scale_matches_fp64(case):
    check(case)


@pytest.mark.parametrize("case", some([*QUARTER_CASES[2:-6:2], *QUARTER_CASES[-6:]], every=4), ids=str)
def test_tiles_are_selected_by_their_quarters(case):
    check(case)


def test_tiles_that_score_alike_are_kept_from_the_left():
    query = torch.zeros(1, 3 * 6 * 7, 1, 16)
    value = torch.randn_like(query)
    problem = Problem(TileGrid((3, 6, 7), (2, 3, 2)), 5, "sparse", 1.0)
    _, indices, _ = forward(query, query, value, None, None, problem)
    assert (indices == torch.arange(5)).all()


class _GivenScores(Launcher):
    """Launches as `Work` does, but puts scores of the test's own into the workspace."""

    def __init__(self, scores):
        self.scores = scores

    def launch(self, kernel, grid, *arguments, **options):
        if kernel is coarse.coarse_kernel:
            workspace = arguments[1]
            workspace[: len(self.scores), : self.scores.shape[1]] = self.scores
        else:
            super().launch(kernel, grid, *arguments, **options)


@pytest.mark.parametrize("count", [9, 45, *(pytest.param(count, marks=pytest.mark.slow) for count in (1, 22, 44))])
def test_the_highest_scores_are_kept_however_they_are_distributed(count):
    grid = TileGrid((5, 10, 14), (2, 4, 3))  # 45 tiles
    normal = torch.randn(45, 45)
    normal[:5] = normal[:5].exp() ** 8
    normal[5:10] = -(normal[5:10].exp() ** 8)
    normal[10:15, ::9] += 1e30
    normal[15:20] = 1e-40 * normal[15:20]
    normal[20:25] = normal[20:25].round()  # many alike, zeros of either sign among them
    normal[25:30, ::2] = float("-inf")
    normal[30:35, 3] = float("inf")
    normal[35] = 3.0
    problem = Problem(grid, count, "sparse", 1.0)
    launcher = _GivenScores(normal)
    x = torch.randn(1, grid.num_tokens, 1, 16)
    indices = torch.full((1, 1, 45, count), -1, dtype=torch.int32)
    pooled = pool(launcher, x, x, x, problem, tiled=True, warps=1)
    form = form_of(x)
    plan = tuning.plan(form, form, form, problem, Device(), Launch("tiled"))
    top_k.select_tiles(launcher, pooled, indices, problem, plan)
    in_order = torch.where(torch.signbit(normal) & (normal == 0), -1e-45, normal)  # -0 orders below 0 here
    right = in_order.sort(descending=True, stable=True).indices[:, :count].sort().values
    assert indices[0, 0].equal(right.int())


def test_the_heads_of_a_large_call_go_through_in_parts(monkeypatch):
    case = Case(combine="merge", heads=3, batch=2, layout="tiled", before=2)
    monkeypatch.setattr(tuning, "WHOLE_COPY_BYTES", 0)
    check(case)


@pytest.mark.parametrize("selection", [pytest.param("mean", marks=pytest.mark.slow), "quarters"])
def test_scores_beyond_the_workspace_take_turns(monkeypatch, selection):
    monkeypatch.setattr(tuning, "LEAST_WORKSPACE_BYTES", 0)
    query, key, value = (torch.randn(1, 6 * 6 * 4, 3, 16) for _ in range(3))
    problem = Problem(TileGrid((6, 6, 4), (2, 2, 2)), 4, "sum", 0.25, selection=selection)
    _, indices, _ = forward(query, key, value, None, None, problem)
    check_indices(query, key, indices, problem)


@pytest.mark.parametrize("combine", ["sparse", "merge"])
def test_a_ratio_of_one_is_dense_attention(combine):
    query, key, value = (torch.randn(1, 5 * 6 * 7 + 6, 1, 32) for _ in range(3))
    output = video_sparse_attention(
        query,
        key,
        value,
        (5, 6, 7),
        top_k_ratio=1.0,
        combine=combine,
        context_tokens=(2, 4),
        implementation="triton",
    )
    dense = torch.nn.functional.scaled_dot_product_attention(*(x.double().transpose(1, 2) for x in (query, key, value)))
    assert relative_error(output, dense.transpose(1, 2)) < 1e-5


def test_a_negative_scale_works():
    query, key, value = (torch.randn(1, 5 * 6 * 7, 1, 32) for _ in range(3))
    arguments = {"top_k_ratio": 0.4, "combine": "merge"}
    output = video_sparse_attention(query, key, value, (5, 6, 7), scale=-0.2, implementation="triton", **arguments)
    assert relative_error(output, video_sparse_attention(-query, key, value, (5, 6, 7), scale=0.2, **arguments)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("selection", ["mean", "quarters"])
def test_gradients_flow_through_the_indices_of_the_forward(selection):
    case = JOINT
    grads = []
    torch.manual_seed(1)
    query, key, value, _, mask = case.inputs()
    for implementation in ("triton", "torch"):
        leaves = [x.clone().requires_grad_() for x in (query, key, value)]
        output = video_sparse_attention(
            *leaves,
            case.video_shape,
            top_k=case.top_k,
            combine=case.combine,
            context_tokens=(case.before, case.after),
            context_mask=mask,
            selection=selection,
            implementation=implementation,
        )
        grads.append(torch.autograd.grad(output.square().sum(), leaves))
    for ours, theirs in zip(*grads, strict=True):
        assert relative_error(ours, theirs) < 1e-5


@pytest.mark.parametrize("combine", ["gate", "sparse"])
def test_rows_far_below_their_bound_match_fp64(combine):
    check_rows_far_below_their_bound(combine)
