"""The small call that decides about the Hopper kernel, on a Hopper GPU: with any release of Triton."""

import logging
from dataclasses import replace

import pytest
import torch

from checks import Case
from oracle import relative_error
from vsa_diffusers.kernels import forward, launch, support, trial, tuning
from vsa_diffusers.kernels.recording import form_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
        reason="runs on a GPU of compute capability 9.0, which the kernel is written for",
    ),
]
LONG, SHORT = (21, 30, 52), (16, 16, 24)
CASES = [
    Case(shape, block_size, top_k=60, combine=combine, heads=4, head_dim=head_dim, after=after, masked=after > 0,
         dtype=torch.bfloat16)
    for head_dim in (64, 128)
    for combine in ("gate", "merge", "sum", "sparse")
    for shape, block_size, after in ((LONG, (4, 4, 4), 0), (LONG, (3, 5, 4), 0), (LONG, (4, 4, 4), 200),
                                     (SHORT, (4, 4, 4), 0))
]  # fmt: skip


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """As a new process: nothing is tried yet, and nothing recorded."""
    monkeypatch.setattr(trial, "_verdicts", {})
    monkeypatch.setattr(trial, "_told", set())
    launch.replays.clear()
    yield
    launch.replays.clear()


def tensors_of(case):
    generator = torch.Generator("cuda").manual_seed(1)
    tokens = case.problem.grid.num_tokens + case.problem.num_context
    shape = (4, 1, tokens, case.heads, case.head_dim)
    query, key, value, gate = torch.randn(shape, generator=generator, device="cuda").to(case.dtype).unbind()
    mask = None
    if case.masked:
        mask = torch.ones(1, case.problem.num_context, dtype=torch.bool, device="cuda")
        mask[:, -9:] = False
    return query, key, value, gate if case.combine == "gate" else None, mask


def plan_of(case, tensors):
    forms = [form_of(x) for x in tensors[:3]]
    return tuning.plan(*forms, case.problem, support.device_of(torch.cuda.current_device()))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_hopper_kernel_passes_with_the_installed_triton_and_the_call_agrees_with_the_portable_one(case, caplog):
    tensors = tensors_of(case)
    chosen = plan_of(case, tensors)
    output = forward(*tensors, case.problem)[0]
    expected = forward(*tensors, case.problem, replace(chosen.sparse, programs=0, sync_chunks=0))[0]
    assert relative_error(output, expected) < 1e-2
    assert list(trial._verdicts.values()) == ([True] if chosen.hopper else [])
    assert not caplog.records


@pytest.mark.parametrize("case", [CASES[16], CASES[20]], ids=str)
def test_after_the_first_call_nothing_waits_for_the_gpu_and_the_generator_is_the_users(case):
    tensors = tensors_of(case)
    before = torch.cuda.get_rng_state()
    forward(*tensors, case.problem)
    assert torch.cuda.get_rng_state().equal(before)
    torch.cuda.set_sync_debug_mode("error")
    try:
        forward(*tensors, case.problem, output_alone=True)
        forward(*tensors, case.problem, output_alone=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert trial._verdicts


def captured(case, tensors):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = forward(*tensors, case.problem)[0]
    graph.replay()
    return output


def test_a_capture_after_a_call_takes_the_hopper_kernel(caplog):
    case = CASES[16]
    tensors = tensors_of(case)
    expected = forward(*tensors, case.problem)[0]
    assert captured(case, tensors).equal(expected)
    assert not caplog.records


def test_a_capture_with_no_call_before_it_takes_the_portable_kernel_says_so_and_is_forgotten(caplog):
    case = CASES[16]
    tensors = tensors_of(case)
    chosen = plan_of(case, tensors)
    # Compiled, as kernels must be before a capture, but nothing is tried yet.
    portable = forward(*tensors, case.problem, replace(chosen.sparse, programs=0, sync_chunks=0))[0]
    with caplog.at_level(logging.WARNING, "vsa_diffusers"):
        assert captured(case, tensors).equal(portable)
    assert "make one call before the capture" in caplog.text
    forward(*tensors, case.problem)
    assert list(trial._verdicts.values()) == [True]


def test_a_kernel_that_fails_gives_way_to_the_portable_one(monkeypatch, caplog):
    from vsa_diffusers.kernels.hopper import forward as hopper

    def fails(*arguments):
        raise RuntimeError("PassManager::run failed")

    monkeypatch.setattr(hopper, "hopper_forward", fails)
    case = CASES[16]
    tensors = tensors_of(case)
    chosen = plan_of(case, tensors)
    expected = forward(*tensors, case.problem, replace(chosen.sparse, programs=0, sync_chunks=0))[0]
    for _ in range(3):
        assert forward(*tensors, case.problem)[0].equal(expected)
    [record] = caplog.records
    assert "PassManager::run failed" in record.getMessage()
    assert trial.COST in record.getMessage()
