"""Launches that are made again; in a process of its own (`conftest.py`)."""

from dataclasses import replace

import pytest
import torch

from checks import (
    DESCRIPTOR_CASES,
    JOINT,
    STRIDE_CASES,
    Case,
    check,
    check_gradients,
    check_output_alone,
    expected,
    some,
)
from oracle import relative_error
from vsa_diffusers import attention, video_sparse_attention
from vsa_diffusers.kernels import forward, launch, support, tuning
from vsa_diffusers.kernels.recording import Recorder, Replay, Replays
from vsa_diffusers.problem import Problem
from vsa_diffusers.tiles import TileGrid

CASES = [
    Case(combine="gate", video_shape=(4, 5, 6), top_k=2, batch=2, layout="tiled"),
    Case(combine="sum", video_shape=(4, 8, 8), top_k=2),
    Case(combine="sparse", video_shape=(3, 2, 2), top_k=1),
    replace(JOINT, video_shape=(4, 5, 6), top_k=2, layout="tiled", heads=2, batch=1),
    replace(STRIDE_CASES[0], video_shape=(4, 5, 5), top_k=2, batch=1),
]


@pytest.fixture(autouse=True)
def replays(monkeypatch):
    """Replays as on a GPU; at the end, some call must have been one."""
    fresh, made, again = Replays(), [], Replay.run
    monkeypatch.setattr(launch, "replays", fresh)
    monkeypatch.setattr(launch, "may_replay", lambda query: True)
    monkeypatch.setattr(Replay, "run", lambda self, tensors: made.append(self) or again(self, tensors))
    yield fresh
    assert made


@pytest.mark.parametrize("case", some(CASES, 4, 5), ids=str)
def test_a_call_that_repeats_the_launches_of_another_matches_fp64(case):
    check(case)
    check_gradients(case)


@pytest.mark.parametrize("case", some([JOINT, CASES[0]], every=2), ids=str)
def test_the_output_alone_is_the_same(case, monkeypatch, replays):
    monkeypatch.setattr(tuning, "WHOLE_COPY_BYTES", 0)  # some heads at a time, each with indices of their own
    check_output_alone(replace(case, video_shape=(4, 5, 6), top_k=2, layout="tiled"))
    assert len(replays.known) == 2


@pytest.mark.skipif(not support.HAS_DESCRIPTORS, reason="runs with Triton 3.6 or later: pip install 'triton>=3.6'")
def test_descriptors_are_moved_to_the_new_workspace():
    check(DESCRIPTOR_CASES[1])
    check_gradients(DESCRIPTOR_CASES[1])


def test_heads_that_go_through_in_parts_share_the_workspace(monkeypatch, replays):
    monkeypatch.setattr(tuning, "WHOLE_COPY_BYTES", 0)
    monkeypatch.setattr(tuning, "WHOLE_BACKWARD_COPY_BYTES", 0)
    case = Case(video_shape=(4, 4, 5), top_k=1, combine="gate", heads=3, head_dim=16, layout="tiled", before=2)
    check(case)
    check_gradients(case)
    in_parts = next(iter(replays.known.values()))
    replays.clear()
    monkeypatch.setattr(tuning, "WHOLE_COPY_BYTES", 2**30)
    check(case)
    at_once = next(iter(replays.known.values()))
    assert len(in_parts.launches) == 2 * len(at_once.launches)
    assert in_parts.workspace_bytes < at_once.workspace_bytes


def test_query_key_and_value_of_one_projection_are_told_apart():
    problem = Problem(TileGrid((5, 6, 7), (4, 4, 4)), 3, "merge", 32**-0.5)

    def call(*tensors):
        output, indices, _ = forward(*tensors, None, None, problem)
        right, _ = expected(*tensors, None, None, indices, problem)
        assert relative_error(output, right) < 1e-5

    call(*torch.randn(1, 210, 3, 2, 32).unbind(2))
    call(*(torch.randn(1, 210, 3, 2, 32)[:, :, index] for index in (2, 0, 1)))


@pytest.mark.parametrize("combine", some(["merge", "gate"], every=2))
def test_the_operator_repeats_a_call_without_looking_at_its_arguments(combine, monkeypatch):
    looked, check = [], attention.check_video_shape
    monkeypatch.setattr(attention, "_problems", attention._Problems())
    monkeypatch.setattr(attention, "check_video_shape", lambda shape: looked.append(shape) or check(shape))
    for _ in range(2):
        query, key, value, gate = torch.randn(4, 1, 125, 2, 16).unbind()
        arguments = dict(top_k=3, gate=gate if combine == "gate" else None, combine=combine, context_tokens=(2, 3))
        output, right = (
            video_sparse_attention(query, key, value, (4, 5, 6), block_size=(2, 4, 4), implementation=name, **arguments)
            for name in ("triton", "torch")
        )
        assert relative_error(output, right) < 1e-5
    assert len(looked) == 2  # of two calls for each implementation


def test_other_shapes_strides_dtypes_and_problems_are_recorded_anew(replays):
    case = Case(combine="sum", video_shape=(4, 4, 6), top_k=1)
    changes = [{}, {"batch": 2}, {"heads": 2}, {"dtype": torch.float16}, {"transposed": True}, {"top_k": 2}]
    for change in [*changes, {"layout": "tiled"}, {"combine": "merge"}, {"video_shape": (4, 6, 4)}]:
        check(replace(case, **change))
    assert len(replays.known) == 9
    query, key, value, *_ = case.inputs()
    shifted = torch.empty(query.numel() + 1)[1:].view(query.shape).copy_(query)
    output, *_ = forward(shifted, key, value, None, None, case.problem, case.launch)
    assert len(replays.known) == 10
    assert torch.equal(output, forward(query, key, value, None, None, case.problem, case.launch)[0])


def test_only_the_latest_kinds_of_calls_are_remembered(replays):
    replays.most = 2
    for top_k in (1, 2, 3, 4):
        check(Case(video_shape=(4, 5, 6), top_k=top_k))
    assert len(replays.known) == 2


def test_memory_that_was_freed_is_given_out_again_and_memory_in_use_is_not():
    like = torch.empty(0)
    recorder = Recorder([like])
    first, second = recorder.empty(like, (1000,)), recorder.empty(like, (1000,))
    recorder.free(first)
    third = recorder.empty(like, (500,))
    fourth = recorder.empty(like, (1000,))
    assert [recorder.allocations[id(x)][1:] for x in (third, second, fourth)] == [
        (0, 2048),
        (4096, 8192),
        (8192, 12288),
    ]
    with pytest.raises(AssertionError, match="neither an argument"):
        recorder._place(torch.empty(1))
    check(Case())
