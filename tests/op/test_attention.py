"""The op against the fp64 oracle, its exactness contract, its bad inputs, and its registration."""

import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from oracle import SCORES, reference, relative_error
from vsa_diffusers import video_sparse_attention
from vsa_diffusers.attention import _warn_few_tiles
from vsa_diffusers.tiles import TileGrid, num_selected_tiles

TOLERANCES = {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def make_inputs(shape, *, batch=1, heads=2, dim=32, before=0, after=0, dtype=torch.float32, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = before + shape[0] * shape[1] * shape[2] + after
    size = (batch, tokens, heads, dim)
    return [(scale * torch.randn(size, generator=generator)).to(dtype) for _ in range(4)]


def sdpa(query, key, value, mask=None):
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value)), mask).transpose(1, 2)


def clear_choice(query, key, shape, block, top_k, before, selection) -> bool:
    """Whether the top-k is beyond doubt: no near-tie at its edge that rounding could decide otherwise."""
    ranked = SCORES[selection](query, key, shape, block, before=before).sort(-1, descending=True).values
    return top_k == ranked.shape[-1] or bool((ranked[..., top_k - 1] - ranked[..., top_k] > 1e-5).all())


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 7), st.integers(1, 9), st.integers(1, 9)),
    block=st.sampled_from([(4, 4, 4), (2, 3, 4), (1, 4, 4), (3, 5, 4), (2, 8, 8)]),
    combine=st.sampled_from(["gate", "sum", "sparse", "merge"]),
    ratio=st.sampled_from([0.01, 0.2, 0.5, 0.9, 1.0]),
    context=st.sampled_from([(0, 0), (3, 0), (0, 5), (2, 4)]),
    masked=st.booleans(),
    batch=st.integers(1, 2),
    selection=st.sampled_from(["mean", "quarters"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 10_000),
)
def test_output_equals_the_oracle(shape, block, combine, ratio, context, masked, batch, selection, dtype, seed):
    before, after = context
    query, key, value, gate = make_inputs(shape, batch=batch, before=before, after=after, dtype=dtype, seed=seed)
    mask = None
    if masked:
        mask = torch.rand(batch, before + after, generator=torch.Generator().manual_seed(seed)) < 0.6
    gate = gate if combine == "gate" else None
    top_k = num_selected_tiles(TileGrid(shape, block).num_tiles, ratio)
    assume(clear_choice(query, key, shape, block, top_k, before, selection))
    actual = video_sparse_attention(
        query, key, value, shape, top_k_ratio=ratio, block_size=block, gate=gate, combine=combine,
        context_tokens=context, context_mask=mask, selection=selection,
    )  # fmt: skip
    expected = reference(
        query, key, value, shape, top_k=top_k, block_size=block, combine=combine, gate=gate, before=before,
        context_mask=mask, selection=selection,
    )  # fmt: skip
    assert actual.dtype == dtype
    assert relative_error(actual, expected) < TOLERANCES[dtype]


@pytest.mark.parametrize("dim", [32, 40, 64, 72, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("combine", ["gate", "merge"])
def test_head_dimensions_and_dtypes(dim, dtype, combine):
    shape, block = (5, 6, 9), (4, 4, 4)
    query, key, value, gate = make_inputs(shape, dim=dim, dtype=dtype, seed=dim)
    gate = gate if combine == "gate" else None
    actual = video_sparse_attention(query, key, value, shape, top_k=4, gate=gate, combine=combine)
    expected = reference(query, key, value, shape, top_k=4, block_size=block, combine=combine, gate=gate)
    assert actual.dtype == dtype
    assert relative_error(actual, expected) < TOLERANCES[dtype]


@pytest.mark.parametrize("scale", [1.0, 4.0, 16.0])
@pytest.mark.parametrize("combine", ["gate", "sum", "sparse", "merge"])
def test_large_activations_stay_exact(scale, combine):
    shape = (5, 6, 7)
    query, key, value, gate = make_inputs(shape, scale=scale)
    gate = gate if combine == "gate" else None
    actual = video_sparse_attention(query, key, value, shape, top_k=3, gate=gate, combine=combine)
    expected = reference(query, key, value, shape, top_k=3, block_size=(4, 4, 4), combine=combine, gate=gate)
    assert relative_error(actual, expected) < 1e-4


@pytest.mark.parametrize("combine", ["merge", "sparse"])
@pytest.mark.parametrize("context", [(0, 0), (7, 3)])
def test_ratio_one_is_dense_attention(combine, context):
    shape = (5, 9, 6)
    query, key, value, _ = make_inputs(shape, batch=2, before=context[0], after=context[1])
    actual = video_sparse_attention(query, key, value, shape, top_k_ratio=1.0, combine=combine, context_tokens=context)
    assert relative_error(actual, sdpa(query, key, value)) < 1e-6


def test_padded_context_keys_have_no_influence():
    shape = (4, 5, 6)
    query, key, value, _ = make_inputs(shape, batch=2, after=8)
    mask = torch.zeros(2, 8, dtype=torch.bool)
    mask[0, :5], mask[1, :2] = True, True
    call = dict(top_k_ratio=0.5, combine="merge", context_tokens=(0, 8), context_mask=mask)
    expected = video_sparse_attention(query, key, value, shape, **call)
    key[:, -8:][~mask], value[:, -8:][~mask] = 1e3, -1e3
    assert video_sparse_attention(query, key, value, shape, **call).equal(expected)


def test_gate_scales_the_coarse_branch_only():
    shape = (4, 8, 8)
    query, key, value, gate = make_inputs(shape)
    sparse = video_sparse_attention(query, key, value, shape, top_k_ratio=0.3, combine="sparse")
    both = video_sparse_attention(query, key, value, shape, top_k_ratio=0.3, combine="sum")
    gated = video_sparse_attention(query, key, value, shape, top_k_ratio=0.3, gate=gate)
    torch.testing.assert_close(gated, sparse + gate * (both - sparse), atol=1e-5, rtol=1e-5)


def test_top_k_and_ratio_name_the_same_thing():
    shape = (8, 8, 8)
    query, key, value, _ = make_inputs(shape)
    by_ratio = video_sparse_attention(query, key, value, shape, top_k_ratio=0.25, combine="merge")
    assert by_ratio.equal(video_sparse_attention(query, key, value, shape, top_k=2, combine="merge"))
    everything = video_sparse_attention(query, key, value, shape, top_k=10_000, combine="sparse")
    assert relative_error(everything, sdpa(query, key, value)) < 1e-6


def test_inputs_of_any_strides_give_the_same():
    shape = (4, 6, 8)
    query, key, value, _ = make_inputs(shape, batch=2)
    expected = video_sparse_attention(query, key, value, shape, combine="merge")
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key, value)]
    fused = torch.cat([query, key, value], -1).chunk(3, -1)
    assert video_sparse_attention(*strided, shape, combine="merge").equal(expected)
    assert video_sparse_attention(*fused, shape, combine="merge").equal(expected)


@pytest.mark.parametrize(
    ("combine", "selection"),
    [("gate", "mean"), ("sum", "mean"), ("sparse", "mean"), ("merge", "mean"), ("merge", "quarters")],
)
@pytest.mark.parametrize("context", [(0, 0), (2, 3)])
def test_gradients_pass_gradcheck(combine, selection, context):
    shape = (2, 3, 4)
    query, key, value, gate = (
        x.requires_grad_()
        for x in make_inputs(shape, heads=1, dim=4, before=context[0], after=context[1], dtype=torch.float64)
    )
    mask = torch.ones(1, sum(context), dtype=torch.bool)
    mask[:, 1::2] = False

    def call(query, key, value, gate):
        return video_sparse_attention(
            query, key, value, shape, top_k=3, block_size=(2, 2, 2), combine=combine, selection=selection,
            gate=gate if combine == "gate" else None, context_tokens=context, context_mask=mask,
        )  # fmt: skip

    assert torch.autograd.gradcheck(
        call, (query, key, value, gate if combine == "gate" else gate.detach()), fast_mode=True
    )


def test_gradients_flow_only_to_what_was_attended():
    shape = (1, 4, 8)
    query, key, value, _ = make_inputs(shape, heads=1)
    value.requires_grad_()
    out = video_sparse_attention(query, key, value, shape, top_k=1, block_size=(1, 4, 4), combine="sparse")
    out[:, 0].sum().backward()
    touched = value.grad.abs().sum((0, 2, 3)) > 0
    assert touched.sum() == 16


@pytest.mark.parametrize("combine", ["gate", "merge"])
def test_registration_passes_opcheck(combine):
    query, key, value, gate = (x.requires_grad_() for x in make_inputs((3, 4, 5), batch=2, before=1, after=2))
    mask = torch.ones(2, 3, dtype=torch.bool)
    gate = gate if combine == "gate" else None
    numbers = ([3, 4, 5], [2, 2, 2], 3, combine, 0.2, 1, 2, "quarters", "torch")
    torch.library.opcheck(torch.ops.vsa_diffusers.attention.default, (query, key, value, gate, mask, *numbers))


class Seen(TorchDispatchMode):
    """Collects the operators that are dispatched."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("gradients", [False, True])
def test_a_plain_call_skips_the_dispatcher_and_gives_what_the_operator_gives(gradients):
    query, key, value, _ = make_inputs((8, 8, 8))
    query.requires_grad_(gradients)
    with torch.profiler.profile() as profile:
        direct = video_sparse_attention(query, key, value, (8, 8, 8), combine="merge")
    assert "vsa_diffusers::attention" not in {event.name for event in profile.events()}
    with Seen() as seen:
        through = video_sparse_attention(query, key, value, (8, 8, 8), combine="merge")
    assert "vsa_diffusers::attention" in seen.names
    assert direct.requires_grad == through.requires_grad == gradients
    assert direct.equal(through)


def test_a_call_under_fake_tensors_goes_through_the_dispatcher():
    with FakeTensorMode():
        fake = video_sparse_attention(*(torch.empty(1, 512, 2, 32) for _ in range(3)), (8, 8, 8), combine="merge")
    assert isinstance(fake, FakeTensor)
    assert fake.shape == (1, 512, 2, 32)


@pytest.mark.parametrize("shape", [(11, 6, 1), (5, 7, 3), (4, 4, 1)], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("context", [(0, 0), (2, 3)])
@pytest.mark.parametrize("masked", [False, True])
def test_merge_of_one_head_equals_the_oracle_and_so_do_its_gradients(shape, batch, context, masked):
    # Long heads of one: a chunk holds one query tile, and what is expanded to its shape is no copy.
    given = make_inputs(shape, batch=batch, heads=1, dim=256, before=context[0], after=context[1], dtype=torch.float64)
    mask = torch.ones(batch, sum(context), dtype=torch.bool) if masked else None
    if masked:
        mask[:, ::2] = False
    *leaves, grad = (x.requires_grad_() for x in given)
    options = dict(block_size=(4, 5, 4), combine="merge", context_mask=mask)
    tiles = TileGrid(shape, (4, 5, 4)).num_tiles
    for top_k in {1, max(1, tiles - 1), tiles}:
        actual = video_sparse_attention(*leaves, shape, top_k=top_k, context_tokens=context, **options)
        expected = reference(*leaves, shape, top_k=top_k, before=context[0], **options)
        assert relative_error(actual, expected) < 1e-12
        ours, right = (torch.autograd.grad(output, leaves, grad) for output in (actual, expected))
        for mine, theirs in zip(ours, right, strict=True):
            assert relative_error(mine, theirs) < 1e-12


def test_few_tiles_work_and_warn_once_with_the_numbers():
    query, key, value, _ = make_inputs((4, 4, 8))
    _warn_few_tiles.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            video_sparse_attention(query, key, value, (4, 4, 8), combine="merge")
    messages = [str(each.message) for each in caught if "tiles" in str(each.message)]
    assert len(messages) == 1
    assert "(4, 4, 8)" in messages[0]
    assert " 2 tiles" in messages[0]


@pytest.mark.skipif(sys.platform != "linux", reason="runs on Linux, whose /proc/self/status has the peak")
def test_extra_memory_stays_within_twice_the_inputs_at_4096_tokens():
    # VmHWM and not getrusage's ru_maxrss: that one survives exec, so a child begins with its parent's peak.
    script = """
import re, torch
from vsa_diffusers import video_sparse_attention
def peak_bytes():
    with open("/proc/self/status") as status:
        return int(re.search(r"VmHWM:\\s+(\\d+) kB", status.read())[1]) * 1024
torch.set_num_threads(1)
small = [torch.randn(1, 512, 2, 64) for _ in range(3)]
video_sparse_attention(*small, (8, 8, 8), top_k_ratio=0.2, combine="merge")
inputs = [torch.randn(1, 4096, 24, 128) for _ in range(4)]
before = peak_bytes()
with torch.no_grad():
    video_sparse_attention(*inputs[:3], (16, 16, 16), top_k_ratio=0.2, gate=inputs[3], combine="gate")
print((peak_bytes() - before) / sum(x.nbytes for x in inputs))
"""
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert 0 < float(out.stdout) < 2


@pytest.mark.perf
def test_ratio_02_beats_dense_at_4096_tokens():
    script = """
import time, torch, torch.nn.functional as F
from vsa_diffusers import video_sparse_attention
torch.set_num_threads(1)
query, key, value = (torch.randn(1, 4096, 4, 128) for _ in range(3))
heads_first = [x.transpose(1, 2) for x in (query, key, value)]
def best(call):
    times = []
    for _ in range(4):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return min(times[1:])
with torch.no_grad():
    dense = best(lambda: F.scaled_dot_product_attention(*heads_first))
    sparse = best(lambda: video_sparse_attention(query, key, value, (16, 16, 16), top_k_ratio=0.2, combine="merge"))
print(dense / sparse)
"""
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert float(out.stdout) > 1.2
