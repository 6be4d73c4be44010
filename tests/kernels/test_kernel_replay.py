"""Seen by a stub driver: a second call hands the compiled kernels what launching them anew would have handed them."""

import contextlib
import importlib.util
import os
import warnings
import weakref
from decimal import Decimal

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("runs with TRITON_INTERPRET unset, and Triton: pip install 'triton>=3.6'", allow_module_level=True)

from vsa_diffusers.kernels.support import is_recent_triton

if not is_recent_triton():
    pytest.skip("runs with Triton 3.6 or later: pip install 'triton>=3.6'", allow_module_level=True)

from vsa_diffusers import attention, video_sparse_attention
from vsa_diffusers.kernels import backward, forward, launch, tuning
from vsa_diffusers.kernels.plans import Launch
from vsa_diffusers.kernels.recording import Replays
from vsa_diffusers.kernels.select.pool import pool_kernel
from vsa_diffusers.kernels.sparse.forward import sparse_forward_kernel
from vsa_diffusers.problem import Problem
from vsa_diffusers.tiles import TileGrid


@pytest.fixture
def driver(monkeypatch):
    from stub_driver import hopper_stub

    monkeypatch.setattr(launch, "replays", Replays())
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


@pytest.mark.parametrize(
    ("combine", "video_shape", "heads"),
    [("gate", (6, 8, 8), 2), pytest.param("merge", (32, 16, 18), 3, marks=pytest.mark.slow)],
)
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
def test_a_second_call_of_the_hopper_kernel_has_its_own_tensors_too(driver, monkeypatch):
    if importlib.util.find_spec("triton.experimental.gluon") is None:
        pytest.skip("runs with a Triton that has Gluon: pip install 'triton>=3.6'")
    monkeypatch.setattr(tuning, "WHOLE_COPY_BYTES", 2**16)  # in two parts
    grid = TileGrid((8, 8, 12), (4, 4, 4))
    problem = Problem(grid, 3, "gate", 0.1, before=2, after=5)
    calls = []
    for _ in range(2):
        given = {name: torch.empty(1, grid.num_tokens + 7, 2, 128, dtype=torch.bfloat16) for name in "qkvg"}
        hopper = Launch("descriptor", stages=3, programs=264)
        given["output"], given["indices"], given["lse"] = forward(*given.values(), None, problem, hopper)
        calls.append(comparable(driver.launches, given))
        driver.launches.clear()
    first, second = calls
    assert len(first) == 9
    assert first == second
    (name, _, second_head), (last, *_) = first[-2:]
    assert (name, last) == ("hopper_forward_kernel", "sparse_forward_kernel")  # the last for context queries
    head_bytes = 2 * 128
    token_bytes = 2 * head_bytes
    for argument, tensor in (("query", "q"), ("gate", "g"), ("output", "output")):
        assert second_head[argument] == (tensor, problem.before * token_bytes + head_bytes)
    assert second_head["context_key"] == ("k", head_bytes)


def test_a_new_size_compiles_no_other_hopper_kernel(driver):
    if importlib.util.find_spec("triton.experimental.gluon") is None:
        pytest.skip("runs with a Triton that has Gluon: pip install 'triton>=3.6'")
    from vsa_diffusers.kernels.hopper.forward import hopper_forward_kernel

    def call(video_shape, top_k, before, after, sync_chunks):
        grid = TileGrid(video_shape, (4, 4, 4))
        query = torch.empty(1, grid.num_tokens + before + after, 2, 128, dtype=torch.bfloat16)
        hopper = Launch("descriptor", stages=3, programs=264, sync_chunks=sync_chunks)
        forward(query, query, query, query, None, Problem(grid, top_k, "gate", 0.1, before, after), hopper)

    def variants():
        return len(hopper_forward_kernel.device_caches[driver.get_current_device()][0])

    call((8, 8, 12), 3, 2, 5, 1)
    assert variants() == 1
    call((12, 8, 16), 16, 16, 1, 4)
    call((16, 12, 8), 1, 0, 64, 8)
    assert variants() == 1


@pytest.mark.parametrize(
    ("combine", "selection", "layout", "programs"),
    [
        ("gate", "mean", "direct", 0),
        ("merge", "quarters", "descriptor", 0),
        pytest.param("sum", "quarters", "descriptor", 264, marks=pytest.mark.slow),
    ],
)
def test_all_numbers_that_kernels_are_compiled_anew_for_are_strides(driver, combine, selection, layout, programs):
    if programs and importlib.util.find_spec("triton.experimental.gluon") is None:
        pytest.skip("runs with a Triton that has Gluon: pip install 'triton>=3.6'")
    from compilation import BACKWARD_KERNELS, KERNELS

    kernels = {kernel.fn.__name__: kernel for kernel in (*KERNELS.values(), *BACKWARD_KERNELS.values())}
    grid = TileGrid((6, 8, 9), (4, 4, 4))
    query = torch.empty(1, grid.num_tokens + 7, 2, 64, dtype=torch.bfloat16)
    problem = Problem(grid, 3, combine, 0.1, 2, 5, selection)
    given = (query, query, query, query if combine == "gate" else None, None)
    output, indices, lse = forward(*given, problem, Launch(layout, programs=programs))
    backward(query, *given, indices, lse, output, problem)
    assert len(driver.launches) >= 12
    for name, _, arguments in driver.launches:
        free = {each.name for each in kernels[name].params if each.is_constexpr or each.do_not_specialize}
        fixed = {each for each, value in arguments.items() if isinstance(value, int)} - free
        assert {each for each in fixed if not each.endswith(("_b", "_s", "_h"))} == set(), name


def test_a_new_size_is_launched_anew_and_compiles_nothing(driver):
    def call(*video_shape):
        query = torch.empty(1, TileGrid(video_shape, (4, 4, 4)).num_tokens, 1, 64, dtype=torch.bfloat16)
        forward(query, query, query, None, None, Problem(TileGrid(video_shape, (4, 4, 4)), 2, "sum", 0.1))

    def variants():
        kernels = (sparse_forward_kernel, pool_kernel)
        return [len(kernel.device_caches[driver.get_current_device()][0]) for kernel in kernels]

    call(8, 8, 8)
    before = variants()
    call(8, 12, 8)
    call(12, 8, 8)
    assert variants() == before == [1, 1]
    assert len(launch.replays.known) == 3
    assert len(driver.launches) == 12


SHAPE = (8, 8, 16)  # 16 tiles, no warning
CALL = dict(video_shape=SHAPE, top_k_ratio=0.2)
IN_CONTEXT = dict(video_shape=(8, 8, 15), context_tokens=(4, 60))


@pytest.fixture
def checked(monkeypatch):
    """Grows with every call of the operator that looks at its arguments."""
    monkeypatch.setattr(attention, "_problems", attention._Problems())
    calls, check = [], attention.check_video_shape
    monkeypatch.setattr(attention, "check_video_shape", lambda shape: calls.append(shape) or check(shape))
    return calls


def make_tensors(names="qkv", tokens=1024, **options):
    return {name: torch.empty(1, tokens, 2, 64, **dict(dtype=torch.bfloat16) | options) for name in names}


def call_op(q, k, v, g=None, **arguments):
    return video_sparse_attention(q, k, v, gate=g, **CALL | arguments)


def launched(driver, tensors, **arguments):
    """What a call launches, with its pointers named."""
    driver.launches.clear()
    output = call_op(*tensors.values(), **arguments)
    return comparable(driver.launches, tensors | {"output": output})


@pytest.mark.parametrize(
    ("names", "arguments"),
    [
        ("qkvg", {}),
        ("qkv", dict(combine="merge", top_k=3, scale=0.3, selection="quarters")),
        ("qkv", IN_CONTEXT | dict(block_size="auto", implementation="triton")),
    ],
)
@pytest.mark.usefixtures("workspaces")
def test_arguments_are_looked_at_once(driver, checked, names, arguments):
    first, second, third = (launched(driver, make_tensors(names), **arguments) for _ in range(3))
    assert len(checked) == 1
    assert len(first) >= 4
    assert first == second == third
    own = {x[0] for _, _, values in third for x in values.values() if isinstance(x, tuple)}
    assert own >= {*names, "output"}


def shifted(x):
    """The same, from an address that is no multiple of 16."""
    return torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x)


def heads_first(x):
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def spread(x):
    """The same, with gaps between the elements of a head."""
    return torch.stack([x, x], -1)[..., 0]


OTHER_ARGUMENTS = {
    "video_shape": dict(video_shape=(8, 15, 8)),
    "top_k_ratio": dict(top_k_ratio=0.4),
    "top_k": dict(top_k=5),
    "block_size": dict(block_size=(4, 4, 2)),
    "combine": dict(combine="sparse"),
    "scale": dict(scale=0.5),
    "context_tokens": dict(context_tokens=(60, 4)),
    "selection": dict(selection="quarters"),
    "implementation": dict(implementation="triton"),
}
OTHER_TENSORS = {
    "batch": lambda x: torch.cat([x, x]),
    "heads": lambda x: x[:, :, :1],
    "head_dim": lambda x: x[..., :32],
    "dtype": torch.Tensor.half,
}


@pytest.mark.parametrize("change", [*OTHER_ARGUMENTS, *OTHER_TENSORS, "gate"])
@pytest.mark.usefixtures("workspaces")
def test_other_arguments_and_tensors_are_looked_at_and_launched_as_the_first_call_would(driver, checked, change):
    tensors, arguments = make_tensors(), IN_CONTEXT | OTHER_ARGUMENTS.get(change, {})
    first = [launched(driver, tensors, **IN_CONTEXT) for _ in range(2)][1]
    other = {name: OTHER_TENSORS[change](x) for name, x in tensors.items()} if change in OTHER_TENSORS else tensors
    other = other | make_tensors("g") if change == "gate" else other
    after = launched(driver, other, **arguments)
    assert len(checked) == 2
    assert (after == first) == (change == "implementation")
    launch.replays.clear()
    assert launched(driver, other, **arguments) == after
    assert launched(driver, tensors, **IN_CONTEXT) == first


@pytest.mark.parametrize("name", "qkvg")
@pytest.mark.parametrize("change", [shifted, heads_first, spread])
@pytest.mark.usefixtures("workspaces")
def test_one_tensor_of_another_form_is_launched_as_the_first_call_would(driver, checked, change, name):
    tensors = make_tensors("qkvg")
    first = [launched(driver, tensors) for _ in range(2)][1]
    assert len(launch.replays.known) == 1
    other = tensors | {name: change(tensors[name])}
    after = launched(driver, other)
    assert len(launch.replays.known) == (1 if change is spread else 2)  # which is copied, and then like the others
    # Where Triton compiles other code, or is given a copy, the stub driver does not tell.
    assert (after == first) == (change is shifted)
    assert launched(driver, other) == after
    assert len(checked) == 1


def test_a_gate_that_must_be_cast_is_cast(driver, checked):
    tensors = make_tensors("qkv") | make_tensors("g", dtype=torch.float32)
    for _ in range(2):
        call_op(**tensors)
    call_op(**make_tensors("qkvg"))  # is launched as the cast one was
    assert len(launch.replays.known) == 1


def test_context_masks_are_looked_at_in_every_call(driver, checked):
    mask = torch.ones(1, 64, dtype=torch.bool)
    for _ in range(2):
        call_op(**make_tensors(), **IN_CONTEXT, context_mask=mask)
        call_op(**make_tensors(), **IN_CONTEXT)
    assert len(checked) == 1
    with pytest.raises(ValueError, match="context_mask of shape"):
        call_op(**make_tensors(), **IN_CONTEXT, context_mask=mask.int())


EQUAL_BUT_INVALID = {
    "complex extent": (dict(video_shape=SHAPE), dict(video_shape=(8 + 0j, 8, 16)), ValueError, "video_shape="),
    "complex block": (dict(block_size=(4, 4, 4)), dict(block_size=(4, 4 + 0j, 4)), ValueError, "block_size="),
    "decimal ratio": (dict(top_k_ratio=0.5), dict(top_k_ratio=Decimal("0.5")), ValueError, "must be in"),
    "complex ratio": (dict(top_k_ratio=0.5), dict(top_k_ratio=0.5 + 0j), ValueError, "must be in"),
    "complex top_k": (dict(top_k=2), dict(top_k=2 + 0j), ValueError, "top_k="),
    "complex scale": (dict(scale=0.5), dict(scale=0.5 + 0j), ValueError, "scale="),
    "complex context": (dict(context_tokens=(0, 0)), dict(context_tokens=(0j, 0)), ValueError, "context_tokens="),
    "true extent": (dict(video_shape=(1, 64, 16)), dict(video_shape=(True, 64, 16)), ValueError, "video_shape="),
    "true block": (dict(block_size=(1, 4, 4)), dict(block_size=(True, 4, 4)), ValueError, "block_size="),
    "true ratio": (dict(top_k_ratio=1), dict(top_k_ratio=True), ValueError, "top_k_ratio="),
    "true top_k": (dict(top_k=1), dict(top_k=True), ValueError, "top_k="),
    "true scale": (dict(scale=1), dict(scale=True), ValueError, "scale="),
    "false context": (dict(context_tokens=(0, 0)), dict(context_tokens=(0, False)), ValueError, "context_tokens="),
}


@pytest.mark.parametrize("name", EQUAL_BUT_INVALID)
def test_invalid_arguments_that_equal_those_of_an_earlier_call_are_refused(driver, checked, name):
    valid, invalid, error, message = EQUAL_BUT_INVALID[name]
    assert valid == invalid
    for _ in range(2):
        call_op(**make_tensors(), **valid)
    assert len(checked) == 1
    with pytest.raises(error, match=message):
        call_op(**make_tensors(), **invalid)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(k=torch.empty(2, 1024, 2, 64, dtype=torch.bfloat16)), r"key.shape=\(2, 1024, 2, 64\) does not match"),
        (dict(v=torch.empty(1, 1024, 2, 64, dtype=torch.float16)), "value.dtype=torch.float16 does not match"),
        (dict(k=torch.empty(1, 1024, 2, 64, dtype=torch.bfloat16, device="meta")), "key.device=meta does not match"),
        (dict(g=torch.empty(1, 1024, 2, 64, dtype=torch.bfloat16)), "combine='merge' does not use it"),
        (dict(q=torch.empty(1, 1024, 2, 64).to_sparse()), "query.layout"),
    ],
    ids=["batch", "dtype", "device", "gate", "sparse"],
)
def test_tensors_that_do_not_fit_those_of_an_earlier_call_are_refused(driver, changes, message):
    for _ in range(2):
        call_op(**make_tensors(), combine="merge", block_size="auto")
        call_op(**make_tensors(), combine="merge")
    with pytest.raises(ValueError, match=message):
        call_op(**make_tensors() | changes, combine="merge")
    if "g" in changes:
        with pytest.raises(ValueError, match='block_size="auto" does not go with'):
            call_op(**make_tensors() | changes, block_size="auto")


def test_arguments_that_are_no_keys_are_looked_at_each_time(driver, checked):
    shape, tensors = list(SHAPE), make_tensors()
    for given in (SHAPE, SHAPE, shape, shape, iter(SHAPE), iter(SHAPE), torch.Size(SHAPE)):
        call_op(**tensors, video_shape=given, block_size=(1, 4, 4))
    assert len(checked) == 6
    shape[0] = 9
    with pytest.raises(ValueError, match=r"video_shape=\(9, 8, 16\) has 9 \* 8 \* 16"):
        call_op(**tensors, video_shape=shape)


@pytest.mark.parametrize(
    ("usual", "other"),
    [
        (dict(video_shape=SHAPE), dict(video_shape=(8.0, 8, 16))),
        (dict(block_size=(4, 4, 4)), dict(block_size=(4, 4, 4.0))),
        (dict(top_k=2), dict(top_k=2.0)),
        (dict(context_tokens=(0, 0)), dict(context_tokens=(0.0, 0))),
    ],
    ids=str,
)
def test_numbers_of_another_type_are_looked_at(driver, checked, usual, other):
    assert usual == other
    for arguments in (usual, usual, other):
        call_op(**make_tensors(), **arguments)
    assert len(checked) == 2


def test_a_scale_that_changes_is_looked_at(driver):
    scale = torch.tensor(0.5)
    first = launched(driver, make_tensors(), scale=scale)
    scale.fill_(0.25)
    second = launched(driver, make_tensors(), scale=scale)
    assert second[-1][2]["scale"] == first[-1][2]["scale"] / 2


class Subclass(torch.Tensor):
    pass


def test_calls_that_the_dispatcher_or_autograd_must_see_are_looked_at(driver, checked):
    tensors = make_tensors()
    for _ in range(2):
        call_op(**tensors)
    assert len(checked) == 1
    with FakeTensorMode():
        assert isinstance(call_op(**make_tensors()), FakeTensor)
    assert len(checked) == 2
    call_op(**tensors | {"v": tensors["v"].as_subclass(Subclass)})
    assert len(checked) == 3
    tensors["k"].requires_grad_()
    assert call_op(**tensors).requires_grad
    with torch.no_grad():
        assert not call_op(**tensors).requires_grad
    assert len(checked) == 3
    compiled = torch.compile(call_op, backend="eager", fullgraph=True)
    driver.launches.clear()
    assert compiled(**make_tensors()).shape == tensors["q"].shape
    assert len(driver.launches) == 4
    driver.launches.clear()
    queries = torch.stack([tensors["q"], tensors["q"]])
    assert torch.func.vmap(lambda q: call_op(q, q, q))(queries).shape == queries.shape
    assert len(driver.launches) == 8


def test_without_replays_and_once_they_are_forgotten_kernels_are_launched_anew(driver, checked, monkeypatch):
    for _ in range(2):
        call_op(**make_tensors())
    with monkeypatch.context() as patch:
        patch.setattr(launch, "may_replay", lambda query: False)
        patch.setattr(launch, "replays", None)
        driver.launches.clear()
        call_op(**make_tensors())
        assert len(driver.launches) == 4
    launch.replays.clear()
    assert not launch.replays.known
    call_op(**make_tensors())
    assert len(launch.replays.known) == 1
    assert len(checked) == 1


def test_only_the_latest_requests_are_remembered(driver, checked, monkeypatch):
    monkeypatch.setattr(attention._problems, "most", 2)
    for top_k in (1, 2, 3, 3, 2, 1):
        call_op(**make_tensors(), top_k=top_k)
    assert len(checked) == 4
    assert len(attention._problems) == 2


def test_a_call_that_is_found_launches_on_the_device_of_its_tensors(driver, monkeypatch):
    entered = []

    @contextlib.contextmanager
    def on_device(device):
        driver.launches.clear()
        yield
        entered.append((device, len(driver.launches)))

    call_op(**make_tensors())
    monkeypatch.setattr(launch, "on_device", on_device)
    call_op(**make_tensors())
    assert entered == [(torch.device("cpu"), 4)]
    assert len(driver.launches) == 4


def test_records_are_bounded_and_keep_no_tensors(driver, checked):
    launch.replays.most = 3
    tensors = make_tensors()
    alive = [weakref.ref(x) for x in tensors.values()]
    for top_k in (1, 2, 3):
        call_op(**tensors, top_k=top_k)
    known = list(launch.replays.known)
    assert len(known) == 3
    tensors["q"] = spread(tensors["q"])  # recorded already, but not found
    for _ in range(3):
        call_op(**tensors, top_k=3)
    assert list(launch.replays.known) == known
    driver.launches.clear()
    del tensors
    assert [ref() for ref in alive] == [None] * 3


def test_few_tiles_warn_once_though_the_call_is_found(driver, checked):
    attention._warn_few_tiles.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            call_op(**make_tensors(tokens=512), video_shape=(8, 8, 8))
    assert len(checked) == 1
    assert len([each for each in caught if "makes 8 tiles" in str(each.message)]) == 1
