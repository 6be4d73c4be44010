"""The backward pass against fp64, in a process of its own (`conftest.py`)."""

from dataclasses import replace

import pytest
import torch

from checks import (
    CONTEXT_CASES,
    DESCRIPTOR_CASES,
    DIM_CASES,
    JOINT,
    MODE_CASES,
    MODES,
    SHAPE_CASES,
    STRIDE_CASES,
    Case,
    check_gradients,
    some,
)
from oracle import relative_error
from vsa_diffusers import video_sparse_attention
from vsa_diffusers.kernels import tuning
from vsa_diffusers.kernels.recording import Launcher, form_of
from vsa_diffusers.kernels.select.pool import pool
from vsa_diffusers.kernels.select.transpose_lists import rebuild_lists, transpose_lists
from vsa_diffusers.kernels.support import Device
from vsa_diffusers.problem import Problem
from vsa_diffusers.tiles import TileGrid

# What is left out here runs on the GPU: the interpreter takes seconds for each case.
SMALL = [*MODE_CASES[4:], *SHAPE_CASES[:8], JOINT, *(replace(case, batch=1) for case in CONTEXT_CASES[2:])]
SMALL += DESCRIPTOR_CASES
WIDTHS = [*DIM_CASES[:6:2], DIM_CASES[6], replace(STRIDE_CASES[1], heads=1)]
SPREADS = [replace(JOINT, spread=spread, tolerance=tolerance, batch=1) for spread, tolerance in ((4, 1e-4), (16, 1e-3))]
SPREADS += [Case(combine="gate", spread=16.0, tolerance=1e-3)]


@pytest.mark.parametrize("case", some(SMALL, 2, 5), ids=str)
def test_gradients_of_every_mode_and_shape_match_fp64(case):
    check_gradients(case)


@pytest.mark.parametrize("case", some([*WIDTHS, *SPREADS], every=4), ids=str)
def test_gradients_of_every_head_dimension_dtype_and_scale_match_fp64(case):
    check_gradients(case)


def test_the_heads_of_a_large_call_go_through_in_parts(monkeypatch):
    monkeypatch.setattr(tuning, "WHOLE_BACKWARD_COPY_BYTES", 0)
    check_gradients(
        Case(video_shape=(4, 4, 5), top_k=1, combine="gate", heads=3, head_dim=16, layout="tiled", before=2)
    )


def test_the_pooled_keys_of_a_small_call_are_cut_into_parts(monkeypatch):
    monkeypatch.setattr(tuning, "POOLED_PROGRAMS", 3)
    check_gradients(Case(combine="merge", top_k=2))


@pytest.mark.parametrize("tiled", some([False, True], every=2))
def test_the_lists_of_a_key_tile_name_every_query_tile_that_keeps_it_in_order(tiled):
    grid = TileGrid((5, 10, 14), (2, 4, 3))  # 45 tiles: two words of bits, 29 tiles are partial
    problem = Problem(grid, 9, "sparse", 1.0)
    scores = torch.rand(1, 2, grid.num_tiles, grid.num_tiles)
    scores[..., 5] += 1  # a tile that all keep, and one that few keep
    scores[..., 7] -= 0.9
    indices = scores.topk(problem.top_k).indices.sort(-1).values.int()
    launcher = Launcher()
    x = torch.zeros(1, grid.num_tokens, 2, 16)
    boxes = pool(launcher, x, x, x, problem, tiled=tiled, warps=1).boxes
    form = form_of(x)
    plan = tuning.backward_plan(form, [form], problem, Device())
    query_lists = rebuild_lists(launcher, indices, boxes, problem, plan.rebuild, tiled=tiled)
    bits = query_lists.selected_bits
    key_lists = transpose_lists(launcher, bits, problem, plan.transpose, plan.order, tiled=tiled)
    token_of = grid.token_index()
    sizes = (token_of >= 0).sum(1)
    first = sizes.cumsum(0) - sizes if tiled else token_of[:, 0]
    full = sizes == grid.tile_capacity
    for batch_head, kept in enumerate(indices.flatten(0, 1)):
        keeps = torch.zeros(grid.num_tiles, grid.num_tiles, dtype=torch.bool).scatter_(1, kept.long(), True)
        for tile in range(grid.num_tiles):
            begin, group = key_lists.offsets[batch_head, tile].tolist()
            count, groups = key_lists.list_lengths[batch_head, tile].tolist()
            starts = key_lists.full_tile_starts[batch_head, begin : begin + count]
            assert starts.equal(first[keeps[:, tile] & full].int())
            shapes = key_lists.partial_groups[batch_head, group : group + groups] >> 32 & 255
            assert shapes.sum() == sizes[keeps[:, tile] & ~full].sum()
        lengths = keeps.long().T @ torch.where(full, sizes, (sizes + 15) // 16 * 16)
        assert (lengths[key_lists.order[batch_head]].diff() <= 0).all()


@pytest.mark.parametrize("combine", MODES)
def test_the_op_sends_gradients_back_through_the_kernels(combine, monkeypatch):
    monkeypatch.setattr("vsa_diffusers.torch_backward.backward", None)
    case = Case(combine=combine, video_shape=(3, 5, 6), top_k=2)
    query, key, value, gate, _ = (None if x is None else x.requires_grad_() for x in case.inputs())
    call = {"video_shape": case.video_shape, "top_k": 2, "gate": gate, "combine": combine}
    leaves = [query, key, value] + [gate] * (gate is not None)
    ours = torch.autograd.grad(video_sparse_attention(query, key, value, implementation="triton", **call).sum(), leaves)
    monkeypatch.undo()
    right = torch.autograd.grad(video_sparse_attention(query, key, value, implementation="torch", **call).sum(), leaves)
    for mine, theirs in zip(ours, right, strict=True):
        assert relative_error(mine, theirs) < 1e-5


@pytest.mark.slow
def test_registration_passes_opcheck():
    query, key, value, gate = (torch.randn(1, 23, 1, 16, requires_grad=True) for _ in range(4))
    mask = torch.ones(1, 3, dtype=torch.bool)
    numbers = ([1, 4, 5], [2, 4, 4], 1, "gate", 0.2, 1, 2, "mean", "triton")
    torch.library.opcheck(torch.ops.vsa_diffusers.attention.default, (query, key, value, gate, mask, *numbers))
