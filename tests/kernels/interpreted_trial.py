"""Whether the Hopper kernel is taken, as a small call finds out; in Gluon on the CPU, in a process of its own."""

import importlib
import logging
from unittest import mock

import pytest
import torch

from checks import Case
from oracle import relative_error
from vsa_diffusers.kernels import forward, launch, trial
from vsa_diffusers.kernels.recording import Launcher, Replays
from vsa_diffusers.kernels.support import Device

gluon_on_cpu = pytest.importorskip("gluon_on_cpu", reason="runs with Triton's Gluon: pip install 'triton>=3.6'")
from vsa_diffusers.kernels.hopper.forward import hopper_forward_kernel  # noqa: E402 - needs Gluon, too

forwarding = importlib.import_module("vsa_diffusers.kernels.forward")  # hidden by the function of its name
# Short enough to be read through boxes, and long in no axis; all tiles are full.
CASE = Case((4, 4, 8), top_k=1, combine="gate", head_dim=128, dtype=torch.bfloat16)


@pytest.fixture
def hopper(monkeypatch):
    """A Hopper GPU as far as the choice goes; returns the grids of the Hopper kernel's launches."""
    launches = []

    def launch_one(self, kernel, grid, *arguments, **options):
        if kernel is hopper_forward_kernel:
            launches.append(grid)
            gluon_on_cpu.run(kernel, grid[0], arguments, options)
        else:
            kernel[grid](*arguments, **options)

    monkeypatch.setattr(Launcher, "launch", launch_one)
    monkeypatch.setattr(forwarding, "this_device", lambda device: Device((9, 0), False, 2))
    for name, value in {"TILES": (1, 2, 2), "TOP_K": 2, "HEADS": 1, "PROGRAMS": 2}.items():  # little for the CPU
        monkeypatch.setattr(trial, name, value)
    monkeypatch.setattr(trial, "_verdicts", {})
    monkeypatch.setattr(trial, "_told", set())
    return launches


def call(case=CASE):
    generator = torch.Generator().manual_seed(1)
    problem = case.problem
    shape = (4, 1, problem.grid.num_tokens + problem.num_context, 1, case.head_dim)
    *tensors, gate = torch.randn(shape, generator=generator).to(case.dtype).unbind()
    return forward(*tensors, gate if case.combine == "gate" else None, None, problem)[0]


@pytest.fixture
def portable(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(forwarding, "this_device", lambda device: Device((9, 0)))
        return call()


@pytest.mark.parametrize("combine", ["gate", "merge"])
def test_a_kernel_that_works_is_tried_once_and_taken(combine, hopper, caplog):
    case = Case(**{**vars(CASE), "combine": combine})
    call(case)
    assert len(hopper) == 2
    call(case)
    assert len(hopper) == 3
    assert hopper[0] == (trial.PROGRAMS,)
    assert not caplog.records


def test_the_small_call_leaves_the_generator_of_the_user_alone(hopper):
    before = torch.get_rng_state()
    call()
    assert hopper
    assert torch.get_rng_state().equal(before)


def test_the_environment_can_do_without_it(hopper, portable, monkeypatch, caplog):
    monkeypatch.setenv(trial.SWITCH, "0")
    assert call().equal(portable)
    assert not hopper
    assert not caplog.records


def test_a_kernel_that_never_ends_is_told_with_the_mend(hopper, monkeypatch):
    class Event:
        def record(self, stream):
            pass

        def query(self):
            return not hopper  # the portable kernel ends

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(trial, "PATIENCE", 0.01)
    awaited = trial._await_gpu
    monkeypatch.setattr(trial, "_await_gpu", lambda device, seconds: awaited(torch.device("cuda"), seconds))
    with pytest.raises(RuntimeError, match=f"start it again with {trial.SWITCH}=0"):
        call()
    assert not trial._verdicts


def wrong_product(a, b, acc, use_acc=True, is_async=False):
    return gluon_on_cpu.Product(a, b, acc if use_acc else 4.0)


def no_compiler(*arguments, **options):
    raise RuntimeError("PassManager::run failed\nand more")


@pytest.mark.parametrize(
    ("mistake", "told"),
    [(wrong_product, "its results are wrong here"), (no_compiler, "RuntimeError: PassManager::run failed)")],
)
def test_a_kernel_that_does_not_work_is_not_taken_and_that_is_told_once_with_its_cost(
    mistake, told, hopper, portable, monkeypatch, caplog
):
    if mistake is no_compiler:
        monkeypatch.setattr(gluon_on_cpu, "run", no_compiler)
    else:
        from triton.experimental.gluon.language.nvidia import hopper as language

        monkeypatch.setitem(gluon_on_cpu.STANDING_IN, id(language.warpgroup_mma), wrong_product)
        monkeypatch.setattr(gluon_on_cpu, "_modules", {})
    tried = []
    for _ in range(3):
        assert call().equal(portable)
        tried.append(len(hopper))
    assert tried[0] == tried[2]
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    for word in (told, trial.COST, "choose another release of Triton"):
        assert word in record.getMessage()


def test_while_a_graph_is_captured_nothing_is_tried_and_nothing_is_remembered(hopper, portable, monkeypatch, caplog):
    replays = Replays()
    monkeypatch.setattr(launch, "replays", replays)
    monkeypatch.setattr(launch, "may_replay", lambda query: True)
    monkeypatch.setattr(forwarding, "is_capturing", lambda device: True)
    assert relative_error(call(), portable) == 0
    assert not hopper
    assert not replays.known
    assert "make one call before the capture" in caplog.text


def test_the_small_call_is_no_part_of_what_is_recorded(hopper, portable, monkeypatch):
    replays = Replays()
    monkeypatch.setattr(launch, "replays", replays)
    monkeypatch.setattr(launch, "may_replay", lambda query: True)
    with mock.patch.object(gluon_on_cpu, "run", no_compiler):
        outputs = [call(), call()]
    [replay] = replays.known.values()
    assert len(replay.launches) == 4
    assert all(output.equal(portable) for output in outputs)


def test_once_it_is_known_a_capture_takes_the_kernel(hopper, monkeypatch):
    call()
    monkeypatch.setattr(forwarding, "is_capturing", lambda device: True)
    call()
    assert len(hopper) == 3


@pytest.mark.parametrize("block_size", [(4, 4, 4), (3, 5, 4)])
@pytest.mark.parametrize("context", [(0, 0), (3, 200)])
def test_the_small_call_is_of_the_same_kind(block_size, context):
    case = Case((6, 10, 21), block_size, top_k=30, combine="merge", head_dim=64, before=context[0], after=context[1])
    kind = trial.Kind(torch.device("cpu"), 64, "merge", "tiled", True, sum(context) > 0, False)
    small = trial._small_problem(kind, case.problem)
    full = [side == 0 for side in (6 % block_size[0], 10 % block_size[1], 21 % block_size[2])]
    sides = zip(small.grid.video_shape, block_size, strict=True)
    assert [extent % side == 0 for extent, side in sides] == full
    assert (small.before, small.after) == (context[0], min(context[1], trial.MOST_CONTEXT))
    assert (small.grid.num_tiles, small.combine) == (18, "merge")
