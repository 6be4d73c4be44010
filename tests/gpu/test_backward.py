"""The Triton backward pass on a GPU, against fp64: `pytest -m gpu tests/gpu`."""

import functools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from checks import (
    CONTEXT_CASES,
    DIM_CASES,
    JOINT,
    MODE_CASES,
    MODES,
    SHAPE_CASES,
    SPREAD_CASES,
    STRIDE_CASES,
    Case,
    check_gradients,
    expected_gradients,
)
from oracle import relative_error
from vsa_diffusers import video_sparse_attention
from vsa_diffusers.kernels import backward, forward, support, tuning
from vsa_diffusers.kernels.plans import BackwardLaunch
from vsa_diffusers.kernels.recording import form_of
from vsa_diffusers.kernels.select import coarse, transpose_lists
from vsa_diffusers.kernels.sparse import backward_key, backward_pooled, backward_preprocess, backward_query
from vsa_diffusers.problem import Problem
from vsa_diffusers.tiles import TileGrid

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="runs on a machine with a CUDA GPU"),
]
# Where few keys hold all weight, the rounding of the output weighs more in the gradients of query and key.
SPREADS = [case if case.tolerance else replace(case, tolerance=4e-3 * case.spread) for case in SPREAD_CASES]
SMALL = [*MODE_CASES, *SHAPE_CASES, *CONTEXT_CASES, *DIM_CASES, *STRIDE_CASES, *SPREADS]
MEDIUM = Case(video_shape=(9, 18, 22), top_k=20, combine="merge", head_dim=128, dtype=torch.bfloat16, heads=2)
KERNELS = (
    backward_preprocess.backward_preprocess_kernel,
    transpose_lists.rebuild_lists_kernel,
    transpose_lists.transpose_lists_kernel,
    transpose_lists.order_lists_kernel,
    backward_query.dq_kernel,
    backward_key.dkdv_kernel,
    backward_pooled.pooled_dkdv_kernel,
    coarse.coarse_kernel,
    coarse.coarse_gradient_kernel,
)


def randn(*shape, dtype=torch.bfloat16, **options):
    return torch.randn(shape, device="cuda", dtype=dtype, **options)


def leaves(*shape, count=4, **options):
    return [randn(*shape, requires_grad=True, **options) for _ in range(count)]


def triton(query, key, value, video_shape, **options):
    return video_sparse_attention(query, key, value, video_shape, implementation="triton", **options)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_gradients_of_small_cases_match_fp64(case):
    check_gradients(case, "cuda")


@pytest.mark.parametrize("layout", tuning.LAYOUTS)
@pytest.mark.parametrize("combine", MODES)
@pytest.mark.parametrize(
    ("head_dim", "dtype"), [(64, torch.bfloat16), (96, torch.bfloat16), (128, torch.bfloat16), (128, torch.float16)]
)
def test_gradients_of_every_layout_match_fp64(layout, combine, head_dim, dtype):
    case = replace(MEDIUM, layout=layout, combine=combine, head_dim=head_dim, dtype=dtype)
    if layout == "descriptor" and not support.can_describe(randn(1, head_dim), support.device_of(0)):
        pytest.skip("runs on a GPU of compute capability 9.0 or later with: pip install 'triton>=3.6'")
    check_gradients(case, "cuda")


@pytest.mark.parametrize(
    "case", [JOINT, replace(MEDIUM, top_k=40, before=70, after=200, masked=True, batch=2)], ids=str
)
@pytest.mark.parametrize("combine", ["gate", "merge"])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_gradients_of_the_table_s_own_launches_match_fp64(case, combine, head_dim):
    case = replace(case, combine=combine, head_dim=head_dim, dtype=torch.bfloat16)
    query, key, value, gate, mask = case.inputs("cuda")
    output, indices, lse = forward(query, key, value, gate, mask, case.problem)
    given = (torch.randn_like(output), query, key, value, gate, mask, indices)
    ours, right = backward(*given, lse, output, case.problem), expected_gradients(*given, case.problem)
    for mine, exact in zip(ours[: len(right)], right, strict=True):
        assert relative_error(mine, exact) < 1e-2


@pytest.mark.parametrize("spread", [1.0, 4.0, 16.0])
def test_gradients_at_a_ratio_of_one_err_little_more_than_those_of_dense_bf16_attention(spread):
    video_shape = (8, 14, 22)
    inputs = [randn(1, 8 * 14 * 22, 2, 128) * (spread if which < 2 else 1) for which in range(3)]
    grad = torch.randn_like(inputs[0])

    def gradients(call, dtype=torch.bfloat16):
        given = [x.detach().to(dtype).requires_grad_() for x in inputs]
        return torch.autograd.grad(call(*given), given, grad.to(dtype))

    def dense(*given):
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in given)).transpose(1, 2)

    with sdpa_kernel(SDPBackend.MATH):
        exact = gradients(dense, torch.float64)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        flash = gradients(dense)
    for combine in ("merge", "sparse"):
        ours = gradients(functools.partial(triton, video_shape=video_shape, top_k_ratio=1.0, combine=combine))
        for mine, theirs, right in zip(ours, flash, exact, strict=True):
            assert relative_error(mine, right) <= 1.5 * relative_error(theirs, right)


@pytest.mark.xdist_group("large")
@pytest.mark.parametrize("layout", ["direct", "tiled", "descriptor"])
def test_offsets_beyond_31_bits(layout):
    video_shape, batch, heads, dim = (50, 50, 80), 2, 64, 128
    query, key, value, grad = (randn(batch, 200_000, heads, dim) for _ in range(4))
    assert query.numel() > 2**31
    if layout == "descriptor" and not support.can_describe(query, support.device_of(0)):
        pytest.skip("runs on a GPU of compute capability 9.0 or later with: pip install 'triton>=3.6'")
    grid = TileGrid(video_shape, (4, 4, 4))
    problem = Problem(grid, 40, "sparse", dim**-0.5)
    launch = tuning.backward_launch(form_of(query), problem, support.device_of(0), key.stride(1))
    launch = BackwardLaunch(replace(launch.query, layout=layout), replace(launch.key, layout=layout))
    output, indices, lse = forward(query, key, value, None, None, problem)
    ours = backward(grad, query, key, value, None, None, indices, lse, output, problem, launch)[:3]
    assert all(x.isfinite().all() for x in ours)
    token_of = grid.token_index("cuda")
    valid = token_of >= 0
    q, k, v, g, o = (x[-1, :, -1].double() for x in (query, key, value, grad, output))
    delta, kept = (g * o).sum(-1), indices[-1, -1].long()

    def pairs(rows, columns):
        p = (problem.scale * q[rows] @ k[columns].T - lse[-1, -1, rows, None].double()).exp()
        return p, problem.scale * p * (g[rows] @ v[columns].T - delta[rows, None])

    for tile in (0, 7, grid.num_tiles // 2, grid.num_tiles - 1):
        own = token_of[tile][valid[tile]]
        keys = token_of[kept[tile]][valid[kept[tile]]]
        queries = token_of[(kept == tile).any(1)]
        queries = queries[queries >= 0]
        assert relative_error(ours[0][-1, own, -1], pairs(own, keys)[1] @ k[keys]) < 1e-2
        p, ds = pairs(queries, own)
        assert relative_error(ours[1][-1, own, -1], ds.T @ q[queries]) < 1e-2
        assert relative_error(ours[2][-1, own, -1], p.T @ g[queries]) < 1e-2


@pytest.mark.parametrize("combine", MODES)
def test_the_same_call_gives_the_same_bits(combine):
    query, key, value, gate = leaves(1, 21 * 30 * 52, 3, 128)
    given = gate if combine == "gate" else None
    inputs = [query, key, value] + [gate] * (combine == "gate")
    output = triton(query, key, value, (21, 30, 52), top_k_ratio=0.2, gate=given, combine=combine)
    grad = torch.randn_like(output)
    torch.use_deterministic_algorithms(True)
    try:
        runs = [torch.autograd.grad(output, inputs, grad, retain_graph=True) for _ in range(4)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(x, y) for run in runs[1:] for x, y in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("combine", ["gate", "merge"])
def test_the_host_never_waits(combine):
    inputs = leaves(1, 6144 + 8, 4, 128)
    mask = torch.ones(1, 8, dtype=torch.bool, device="cuda")
    options = {"top_k_ratio": 0.2, "context_tokens": (3, 5), "context_mask": mask, "combine": combine}
    options["gate"] = inputs[3] if combine == "gate" else None
    inputs = inputs if combine == "gate" else inputs[:3]

    def step():
        torch.autograd.grad(triton(*inputs[:3], (16, 16, 24), **options).square().mean(), inputs)

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("combine", ["sum", "merge"])
@pytest.mark.parametrize("shapes", [[(8, 16, 20), (8, 20, 24), (12, 24, 28)], [(9, 18, 22), (5, 21, 35), (10, 17, 29)]])
def test_a_new_size_compiles_nothing(shapes, combine):
    counts = []
    for T, H, W in shapes:
        query, key, value = leaves(1, T * H * W, 2, 128, count=3)
        triton(query, key, value, (T, H, W), top_k=11, combine=combine).sum().backward()
        counts.append([len(kernel.device_caches[0][0]) for kernel in KERNELS])
    assert counts[0] == counts[1] == counts[2]


def test_it_compiles_without_graph_break():
    def layer(query, key, value, gate):
        return triton(query, key, value, (5, 12, 16), top_k_ratio=0.5, gate=gate) + 1

    inputs = leaves(1, 960, 2, 64)
    grad = torch.randn_like(inputs[0])
    eager = torch.autograd.grad(layer(*inputs), inputs, grad)
    compiled = torch.autograd.grad(torch.compile(layer, fullgraph=True)(*inputs), inputs, grad)
    assert all(torch.equal(x, y) for x, y in zip(compiled, eager, strict=True))


@pytest.mark.parametrize("combine", ["gate", "merge"])
def test_registration_passes_opcheck(combine):
    query, key, value, gate = leaves(2, 63, 2, 32, dtype=torch.float32)
    mask = torch.ones(2, 3, dtype=torch.bool, device="cuda")
    numbers = ([3, 4, 5], [2, 2, 2], 3, combine, 0.2, 1, 2, "mean", "triton")
    given = gate if combine == "gate" else None
    torch.library.opcheck(torch.ops.vsa_diffusers.attention.default, (query, key, value, given, mask, *numbers))


def _training_curve(implementation: str, combine: str, steps: int = 200) -> torch.Tensor:
    """Losses of a small attention layer that learns to be another, random one, in bf16."""
    video_shape, heads, dim = (8, 12, 16), 2, 64
    torch.manual_seed(0)
    width = heads * dim
    layer = torch.nn.ModuleDict(
        {name: torch.nn.Linear(width, width) for name in ("query", "key", "value", "gate", "out")}
    )
    teacher = torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.Tanh(), torch.nn.Linear(width, width)).cuda()
    layer.cuda()
    optimizer = torch.optim.AdamW(layer.parameters(), 1e-3)
    losses = []
    for step in range(steps):
        torch.manual_seed(step)
        x = F.interpolate(torch.randn(1, width, 4, 4, 4, device="cuda"), video_shape, mode="trilinear")
        x = x.flatten(2).transpose(1, 2)
        with torch.autocast("cuda", torch.bfloat16):
            q, k, v, g = (layer[name](x).unflatten(-1, (heads, dim)) for name in ("query", "key", "value", "gate"))
            mixed = video_sparse_attention(
                q,
                k,
                v,
                video_shape,
                top_k_ratio=0.25,
                gate=g if combine == "gate" else None,
                combine=combine,
                implementation=implementation,
            )
            prediction = layer["out"](mixed.flatten(2))
        with torch.no_grad():
            target = teacher(x) + x.mean(1, keepdim=True)
        loss = F.mse_loss(prediction.float(), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses).cpu()


@pytest.mark.parametrize("combine", ["gate", "merge"])
def test_training_with_the_kernels_follows_the_curve_of_the_pytorch_implementation(combine):
    ours, theirs = (_training_curve(implementation, combine) for implementation in ("triton", "torch"))
    assert ours[-20:].mean() < 0.85 * ours[:5].mean()
    ours, theirs = (curve.unfold(0, 10, 10).mean(1) for curve in (ours, theirs))
    assert ((ours - theirs).abs() / theirs).max() < 0.03


@pytest.mark.xdist_group("large")
@pytest.mark.parametrize("ratio", [0.5, 0.1])
@pytest.mark.parametrize("combine", ["gate", "merge"])
def test_peak_memory_is_at_most_that_of_dense_flash_attention_and_the_gate(combine, ratio):
    inputs = leaves(1, 75_600, 24, 128)
    grad = torch.randn_like(inputs[0])
    gate = inputs[3] if combine == "gate" else None

    def sparse():
        output = triton(*inputs[:3], (21, 45, 80), top_k_ratio=ratio, gate=gate, combine=combine)
        return torch.autograd.grad(output, inputs if combine == "gate" else inputs[:3], grad)

    def dense():
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            output = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in inputs[:3])).transpose(1, 2)
        return torch.autograd.grad(output, inputs[:3], grad)

    def peak(call):
        call()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    grad_gate = inputs[3].nbytes if combine == "gate" else 0
    assert peak(sparse) <= peak(dense) + grad_gate
