"""A call on a GPU that does not get the kernels says so, once for each reason; the GPU is not there."""

import importlib.util
import logging

import pytest
import torch
import torch._dynamo.testing

from vsa_diffusers import operators, video_sparse_attention

SHAPE = (4, 8, 8)
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="runs with Triton: pip install 'triton>=3.6'"
)


def attend(dtype=torch.bfloat16, head_dim=8, shape=SHAPE, implementation="auto"):
    query = torch.ones(1, shape[0] * shape[1] * shape[2], 1, head_dim, dtype=dtype)
    return video_sparse_attention(query, query, query, shape, combine="merge", implementation=implementation)


@pytest.fixture(autouse=True)
def _nothing_told(monkeypatch):
    monkeypatch.setattr(operators, "_told", set())


@pytest.fixture
def on_gpu(monkeypatch):
    """Tensors on the CPU are taken for tensors on a GPU, as far as the choice of an implementation goes."""
    monkeypatch.setattr(operators, "_is_on_gpu", lambda query: True)


def no_triton(monkeypatch):
    monkeypatch.setattr(operators, "_has_triton", lambda: False)


def with_support(monkeypatch, **changes):
    from vsa_diffusers.kernels import support

    for name, value in changes.items():
        monkeypatch.setattr(support, name, value)
    monkeypatch.setattr(support, "INTERPRETED", changes.get("INTERPRETED", True))
    support.is_recent_triton.cache_clear()
    return support


def old_triton(monkeypatch):
    support = with_support(monkeypatch)
    monkeypatch.setattr(support.triton, "__version__", "3.5.1")


def few_tiles_fit(monkeypatch):
    with_support(monkeypatch, MAX_TILES=3)


def any_gpu(monkeypatch):
    with_support(monkeypatch)


def old_gpu(monkeypatch):
    support = with_support(monkeypatch)
    monkeypatch.setattr(support, "this_device", lambda device: support.Device((7, 5)))


def no_cuda(monkeypatch):
    with_support(monkeypatch, INTERPRETED=False)


@pytest.fixture
def _releases_are_asked_for_again(request):
    yield
    if importlib.util.find_spec("triton") is not None:
        from vsa_diffusers.kernels import support

        support.is_recent_triton.cache_clear()


@pytest.mark.parametrize(
    ("arrange", "call", "words"),
    [
        (no_triton, {}, ["not installed", "pip install triton"]),
        pytest.param(old_triton, {}, ["3.5.1", "upgrade"], marks=needs_triton),
        pytest.param(any_gpu, {"dtype": torch.float32}, ["float32", "cast to torch.bfloat16"], marks=needs_triton),
        pytest.param(any_gpu, {"head_dim": 264}, ["head_dim of at most 256, not 264"], marks=needs_triton),
        pytest.param(few_tiles_fit, {}, ["at most 3 tiles, not 4", "larger block_size"], marks=needs_triton),
        pytest.param(old_gpu, {}, ["8.0 or later, not (7, 5)"], marks=needs_triton),
        pytest.param(no_cuda, {}, ["CUDA or ROCm device", "on cpu"], marks=needs_triton),
    ],
)
@pytest.mark.usefixtures("on_gpu", "_releases_are_asked_for_again")
@pytest.mark.filterwarnings("ignore:video_shape")
def test_what_a_gpu_does_without_kernels_is_told_once_with_the_reason_and_a_mend(
    arrange, call, words, monkeypatch, caplog
):
    arrange(monkeypatch)
    for _ in range(3):
        attend(**call)
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    for word in [*words, "choose", '"torch"']:
        assert word in record.getMessage()


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.filterwarnings("ignore:video_shape")
@needs_triton
def test_every_reason_is_told_and_the_same_with_other_numbers_is_not(monkeypatch, caplog):
    with_support(monkeypatch, MAX_TILES=3)
    attend()
    attend(shape=(4, 8, 12))
    attend(torch.float32)
    attend(torch.float64)
    assert [("tiles" in text, "float32" in text) for text in caplog.messages] == [(True, False), (False, True)]


@pytest.mark.filterwarnings("ignore:video_shape")
def test_neither_a_cpu_nor_an_explicit_choice_is_warned_about(monkeypatch, caplog):
    attend(torch.float32)
    attend(torch.bfloat16)
    monkeypatch.setattr(operators, "_is_on_gpu", lambda query: True)
    attend(torch.float32, implementation="torch")
    assert not caplog.records


def test_what_is_a_gpu_is_told_by_the_device():
    devices = {name: operators._is_on_gpu(torch.empty(0, device=name)) for name in ("cpu", "meta")}
    with torch._subclasses.fake_tensor.FakeTensorMode():
        devices["cuda"] = operators._is_on_gpu(torch.empty(0, device="cuda"))
    assert devices == {"cpu": False, "meta": False, "cuda": True}


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.filterwarnings("ignore:video_shape")
def test_the_warning_breaks_no_graph_and_compiles_nothing_again(monkeypatch, caplog):
    no_triton(monkeypatch)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def layer(query):
        return 1 + video_sparse_attention(query, query, query, SHAPE, combine="merge")

    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    query = torch.ones(1, 256, 1, 8, dtype=torch.bfloat16)
    for _ in range(3):
        compiled(query)
    assert counter.frame_count == 1
    assert len([record for record in caplog.records if record.name == operators.__name__]) == 1
