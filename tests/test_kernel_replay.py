"""Seen by a stub driver: a second call hands the compiled kernels what launching them anew would have handed them."""

import importlib.util
import os

import pytest
import torch

if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("runs with Triton installed and TRITON_INTERPRET unset", allow_module_level=True)

from vsa_diffusers.kernels.run import is_recent_triton

if not is_recent_triton():
    pytest.skip("runs with Triton 3.6 or later", allow_module_level=True)

from vsa_diffusers.kernels import backward, forward, run, tuning
from vsa_diffusers.kernels.replay import Replays
from vsa_diffusers.tiles import TileGrid
from vsa_diffusers.torch_impl import Problem


@pytest.fixture
def driver(monkeypatch):
    from stub_driver import hopper_stub

    monkeypatch.setattr(run, "replays", Replays())
    with hopper_stub() as stub:
        yield stub


@pytest.fixture
def workspaces(monkeypatch):
    """Keeps them: one that is gone could be told from the tensors that take its place no more."""
    alive, empty = [], torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **options: alive.append(empty(*args, **options)) or alive[-1])


def comparable(launches, tensors):
    """Launches with every pointer named: which tensor it belongs to, and bytes from its start."""

    def named(value):
        if hasattr(value, "block_shape"):
            return tuple(value.shape), tuple(value.strides), tuple(value.block_shape), named(value.base)
        address = value.data_ptr() if hasattr(value, "data_ptr") else value
        for name, x in tensors.items():
            if isinstance(address, int) and x.data_ptr() <= address < x.data_ptr() + x.nbytes:
                return name, address - x.data_ptr()
        return "workspace" if hasattr(value, "data_ptr") or (isinstance(value, int) and value > 2**32) else value

    return [(name, grid, {key: named(x) for key, x in arguments.items()}) for name, grid, arguments in launches]


@pytest.mark.parametrize(("combine", "video_shape", "heads"), [("gate", (6, 8, 8), 2), ("merge", (32, 16, 18), 3)])
@pytest.mark.usefixtures("workspaces")
def test_a_second_call_launches_the_same_kernels_on_its_own_tensors(driver, combine, video_shape, heads, monkeypatch):
    monkeypatch.setattr(tuning, "WHOLE_COPY_BYTES", 2**24)  # the larger shape goes through in two parts
    grid = TileGrid(video_shape, (4, 4, 4))
    problem = Problem(grid, 3, combine, 0.1, before=2)
    calls = []
    for _ in range(2):
        given = {name: torch.empty(1, grid.num_tokens + 2, heads, 64, dtype=torch.bfloat16) for name in "qkvgo"}
        gate = given["g"] if combine == "gate" else None
        output, indices, lse = forward(given["q"], given["k"], given["v"], gate, None, problem)
        grads = backward(given["o"], given["q"], given["k"], given["v"], gate, None, indices, lse, output, problem)
        given |= {"output": output, "indices": indices, "lse": lse}
        given |= {f"gradient {index}": x for index, x in enumerate(grads) if x is not None}
        calls.append(comparable(driver.launches, given))
        driver.launches.clear()
    first, second = calls
    assert len(first) >= 13
    assert [launch[:2] for launch in first] == [launch[:2] for launch in second]
    for (name, _, once), (_, _, again) in zip(first, second, strict=True):
        assert once == again, name
    own = {x[0] for _, _, arguments in first for x in arguments.values() if isinstance(x, tuple)}
    assert own >= {"q", "k", "v", "o", "output", "indices", "lse", "gradient 0", "gradient 1", "gradient 2"}


@pytest.mark.usefixtures("workspaces")
def test_a_second_call_of_the_specialised_kernel_has_its_own_tensors_too(driver, monkeypatch):
    if importlib.util.find_spec("triton.experimental.gluon") is None:
        pytest.skip("runs with a Triton that has Gluon")
    monkeypatch.setattr(tuning, "WHOLE_COPY_BYTES", 2**16)  # in two parts
    grid = TileGrid((8, 8, 12), (4, 4, 4))
    problem = Problem(grid, 3, "gate", 0.1, before=2, after=5)
    calls = []
    for _ in range(2):
        given = {name: torch.empty(1, grid.num_tokens + 7, 2, 128, dtype=torch.bfloat16) for name in "qkvg"}
        launch = tuning.Launch("descriptor", stages=3, programs=264)
        given["output"], given["indices"], given["lse"] = forward(*given.values(), None, problem, launch)
        calls.append(comparable(driver.launches, given))
        driver.launches.clear()
    first, second = calls
    assert len(first) == 9
    assert first == second
    (name, _, second_head), (last, *_) = first[-2:]
    assert (name, last) == ("specialised_kernel", "attend_kernel")  # the last for context queries
    head_bytes = 2 * 128
    token_bytes = 2 * head_bytes
    for argument, tensor in (("query", "q"), ("gate", "g"), ("output", "output")):
        assert second_head[argument] == (tensor, problem.before * token_bytes + head_bytes)
    assert second_head["context_key"] == ("k", head_bytes)


def test_a_new_size_compiles_no_other_specialised_kernel(driver):
    if importlib.util.find_spec("triton.experimental.gluon") is None:
        pytest.skip("runs with a Triton that has Gluon")
    from vsa_diffusers.kernels.specialised import specialised_kernel

    def call(video_shape, top_k, before, after, parts):
        grid = TileGrid(video_shape, (4, 4, 4))
        query = torch.empty(1, grid.num_tokens + before + after, 2, 128, dtype=torch.bfloat16)
        launch = tuning.Launch("descriptor", stages=3, programs=264, parts=parts)
        forward(query, query, query, query, None, Problem(grid, top_k, "gate", 0.1, before, after), launch)

    def variants():
        return len(specialised_kernel.device_caches[driver.get_current_device()][0])

    call((8, 8, 12), 3, 2, 5, 1)
    assert variants() == 1
    call((12, 8, 16), 16, 16, 1, 4)
    call((16, 12, 8), 1, 0, 64, 8)
    assert variants() == 1


def test_a_new_size_is_launched_anew_and_compiles_nothing(driver):
    def call(*video_shape):
        query = torch.empty(1, TileGrid(video_shape, (4, 4, 4)).num_tokens, 1, 64, dtype=torch.bfloat16)
        forward(query, query, query, None, None, Problem(TileGrid(video_shape, (4, 4, 4)), 2, "sum", 0.1))

    def variants():
        kernels = (run.attend_kernel, run.pool.__globals__["pool_kernel"])
        return [len(kernel.device_caches[driver.get_current_device()][0]) for kernel in kernels]

    call(8, 8, 8)
    before = variants()
    call(8, 12, 8)
    call(12, 8, 8)
    assert variants() == before == [1, 1]
    assert len(run.replays.known) == 3
    assert len(driver.launches) == 12
