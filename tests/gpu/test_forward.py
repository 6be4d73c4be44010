"""The Triton forward on a GPU, against fp64: `pytest -m gpu tests/gpu`."""

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
    QUARTER_CASES,
    SHAPE_CASES,
    SPREAD_CASES,
    STRIDE_CASES,
    Case,
    check,
    check_chunk_sync,
    check_output_alone,
    check_rows_far_below_their_bound,
    expected,
)
from oracle import relative_error
from vsa_diffusers import video_sparse_attention
from vsa_diffusers.kernels import forward, launch, support, tuning
from vsa_diffusers.kernels.plans import Launch
from vsa_diffusers.kernels.recording import form_of
from vsa_diffusers.kernels.select import coarse, pool, top_k
from vsa_diffusers.kernels.sparse import forward as sparse
from vsa_diffusers.problem import Problem
from vsa_diffusers.tiles import TileGrid

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="runs on a machine with a CUDA GPU"),
]
SMALL = [*MODE_CASES, *SHAPE_CASES, *CONTEXT_CASES, *DIM_CASES, *STRIDE_CASES, *SPREAD_CASES, *QUARTER_CASES]
MEDIUM = Case(video_shape=(9, 18, 22), top_k=20, combine="merge", head_dim=128, dtype=torch.bfloat16, heads=3)


def randn(*shape, dtype=torch.bfloat16):
    return torch.randn(shape, device="cuda", dtype=dtype)


def triton(query, key, value, video_shape, **options):
    return video_sparse_attention(query, key, value, video_shape, implementation="triton", **options)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_small_cases_match_fp64(case):
    check(case, "cuda")


@pytest.mark.parametrize("combine", ["gate", "sparse"])
def test_rows_far_below_their_bound_match_fp64(combine):
    check_rows_far_below_their_bound(combine, "cuda")


@pytest.mark.parametrize("combine", ["gate", "merge"])
@pytest.mark.parametrize("layout", ["direct", "tiled"])
def test_quarters_of_many_tiles_match_fp64(layout, combine):
    check(replace(MEDIUM, selection="quarters", layout=layout, combine=combine, batch=2, before=3), "cuda")


@pytest.mark.parametrize("layout", tuning.LAYOUTS)
@pytest.mark.parametrize("combine", MODES)
@pytest.mark.parametrize(
    ("head_dim", "dtype"), [(64, torch.bfloat16), (96, torch.bfloat16), (128, torch.bfloat16), (128, torch.float16)]
)
def test_every_layout_matches_fp64(layout, combine, head_dim, dtype):
    case = replace(MEDIUM, layout=layout, combine=combine, head_dim=head_dim, dtype=dtype)
    if layout == "descriptor" and not support.can_describe(randn(1, head_dim), support.device_of(0)):
        pytest.skip("runs on a GPU of compute capability 9.0 or later with: pip install 'triton>=3.6'")
    check(case, "cuda")


@pytest.fixture
def hopper_calls(monkeypatch):
    """Counts the calls of the Hopper kernel."""
    if not support.device_of(0).processors:
        pytest.skip("runs on a GPU of compute capability 9.0")
    from vsa_diffusers.kernels.hopper import forward as hopper

    launch.replays.clear()  # what is replayed is not called
    calls = []
    hopper_forward = hopper.hopper_forward

    def count(*arguments):
        calls.append(arguments)
        hopper_forward(*arguments)

    monkeypatch.setattr(hopper, "hopper_forward", count)
    return calls


@pytest.mark.parametrize("spread", [1.0, 4.0, 16.0])
@pytest.mark.parametrize(
    ("layout", "block_size"), [("direct", (4, 4, 4)), ("direct", (2, 4, 8)), ("tiled", (4, 4, 4)), ("tiled", (3, 5, 4))]
)
@pytest.mark.parametrize("combine", MODES)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_hopper_kernel_matches_fp64(head_dim, combine, layout, block_size, spread, hopper_calls):
    form = {"layout": layout, "block_size": block_size, "spread": spread, "programs": 7}
    check(replace(MEDIUM, head_dim=head_dim, combine=combine, batch=2, **form), "cuda")
    assert hopper_calls


@pytest.mark.parametrize("spread", [1.0, 4.0, 16.0])
@pytest.mark.parametrize(("before", "after", "masked"), [(3, 70, True), (0, 64, False), (200, 0, True)])
@pytest.mark.parametrize(("layout", "head_dim"), [("direct", 128), ("descriptor", 128), ("descriptor", 64)])
@pytest.mark.parametrize("combine", MODES)
def test_the_hopper_kernel_takes_context_tokens(combine, layout, head_dim, before, after, masked, spread, hopper_calls):
    form = {"layout": layout, "head_dim": head_dim, "spread": spread, "programs": 7, "sync_chunks": 3}
    check(replace(MEDIUM, combine=combine, batch=2, before=before, after=after, masked=masked, **form), "cuda")
    assert hopper_calls


@pytest.mark.parametrize("combine", ["gate", "merge"])
def test_the_output_alone_is_the_same_beside_context_tokens(combine, hopper_calls, monkeypatch):
    monkeypatch.setattr(tuning, "WHOLE_COPY_BYTES", 0)  # some heads at a time
    form = {"layout": "descriptor", "programs": 7}
    check_output_alone(
        replace(MEDIUM, combine=combine, batch=2, heads=4, before=3, after=70, masked=True, **form), "cuda"
    )
    assert hopper_calls


@pytest.mark.parametrize("spread", [1.0, 2.77])  # at 2.77 some query tiles are left for the end of the kernel
@pytest.mark.parametrize("programs", [1, 7, 264, 100_000])  # the last are more than fit on the GPU at a time
@pytest.mark.parametrize(("layout", "video_shape"), [("descriptor", (18, 34, 42)), ("direct", (16, 32, 40))])
def test_keeping_in_step_changes_no_bit(layout, video_shape, programs, spread, hopper_calls):
    form = {"layout": layout, "video_shape": video_shape, "programs": programs}
    check_chunk_sync(replace(MEDIUM, heads=6, combine="gate", spread=spread, **form), (1, 2, 5, 20), "cuda")


@pytest.mark.parametrize("combine", ["gate", "sparse"])
def test_the_hopper_kernel_finds_rows_far_below_their_bound(combine, hopper_calls):
    check_rows_far_below_their_bound(combine, "cuda", head_dim=128, programs=2)
    assert hopper_calls


def test_the_hopper_kernel_does_whole_tiles_like_the_ordinary_one(hopper_calls):
    query, key, value, gate = (randn(2, 8 * 8 * 12, 5, 128) for _ in range(4))
    problem = Problem(TileGrid((8, 8, 12), (4, 4, 4)), 5, "gate", 128**-0.5)
    for layout in ("direct", "descriptor"):
        launch = Launch(layout, programs=3)
        ours, _, lse = forward(query, key, value, gate, None, problem, launch)
        other, _, other_lse = forward(query, key, value, gate, None, problem, replace(launch, programs=0))
        torch.testing.assert_close(ours, other, rtol=1e-2, atol=1e-3)
        torch.testing.assert_close(lse, other_lse, rtol=1e-6, atol=1e-5)
    assert len(hopper_calls) == 2


@pytest.mark.parametrize("combine", ["gate", "merge"])
def test_the_hopper_kernel_reads_queries_that_boxes_cannot_see(combine, hopper_calls):
    check(replace(MEDIUM, combine=combine, transposed=True, heads=2, layout="descriptor", programs=7), "cuda")
    assert hopper_calls


def test_a_call_that_the_hopper_kernel_cannot_take_goes_to_the_ordinary_one(hopper_calls):
    for case in (
        replace(MEDIUM, head_dim=96, programs=7),
        replace(MEDIUM, dtype=torch.float16, programs=7),
        replace(MEDIUM, block_size=(3, 5, 4), programs=7),
        replace(MEDIUM, transposed=True, heads=2, programs=7),
    ):
        check(case, "cuda")
    assert not hopper_calls


@pytest.mark.parametrize(
    "case", [JOINT, replace(MEDIUM, top_k=40, before=70, after=200, masked=True, batch=2)], ids=str
)
@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_the_table_s_own_launches_match_fp64(case, head_dim):
    case = replace(case, head_dim=head_dim, dtype=torch.bfloat16)
    query, key, value, gate, mask = case.inputs("cuda")
    output, indices, _ = forward(query, key, value, gate, mask, case.problem)
    assert relative_error(output, expected(query, key, value, gate, mask, indices, case.problem)[0]) < 1e-2


@pytest.mark.xdist_group("large")
@pytest.mark.parametrize("video_shape", [(16, 34, 60), (8, 12, 20)])
@pytest.mark.parametrize("spread", [1.0, 4.0, 16.0])
def test_a_ratio_of_one_errs_no_more_than_dense_bf16_attention(video_shape, spread):
    tokens = video_shape[0] * video_shape[1] * video_shape[2]
    query, key, value = (randn(1, tokens, 2, 128) for _ in range(3))
    query, key = query * spread, key * spread
    heads_first = [x.transpose(1, 2) for x in (query, key, value)]
    exact = torch.cat(
        [F.scaled_dot_product_attention(*(x[:, head : head + 1].double() for x in heads_first)) for head in range(2)], 1
    ).transpose(1, 2)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        dense = F.scaled_dot_product_attention(*heads_first).transpose(1, 2)
    for combine in ("merge", "sparse"):
        ours = triton(query, key, value, video_shape, top_k_ratio=1.0, combine=combine)
        assert relative_error(ours, exact) <= 1.5 * relative_error(dense, exact)


@pytest.mark.parametrize(("dtype", "size"), [(torch.bfloat16, 1e15), (torch.float16, 2e3), (torch.float32, 1e15)])
def test_logits_near_overflow_stay_finite(dtype, size):
    video_shape = (5, 10, 13)
    query, key, value = (randn(1, 650, 2, 64, dtype=dtype) for _ in range(3))
    query, key = (x.float().clamp(-4, 4).mul(size).to(dtype) for x in (query, key))
    for combine in ("sum", "merge"):
        assert triton(query, key, value, video_shape, top_k_ratio=0.3, combine=combine).isfinite().all()


@pytest.mark.xdist_group("large")
@pytest.mark.parametrize("combine", ["gate", "merge"])
@pytest.mark.parametrize("layout", tuning.LAYOUTS)
def test_offsets_beyond_31_bits(combine, layout):
    video_shape, batch, heads, dim = (50, 50, 80), 2, 64, 128
    query, key, value, gate = (randn(batch, 200_000, heads, dim) for _ in range(4))
    assert query.numel() > 2**31
    grid = TileGrid(video_shape, (4, 4, 4))
    problem = Problem(grid, 40, combine, dim**-0.5)
    forms = [form_of(x) for x in (query, key, value)]
    launch = replace(tuning.plan(*forms, problem, support.device_of(0)).sparse, layout=layout)
    if layout == "descriptor" and not support.can_describe(query, support.device_of(0)):
        pytest.skip("runs on a GPU of compute capability 9.0 or later with: pip install 'triton>=3.6'")
    given = gate if combine == "gate" else None
    output, indices, _ = forward(query, key, value, given, None, problem, launch)
    assert output.isfinite().all()
    token_of = grid.token_index("cuda")
    valid = token_of >= 0
    sizes = valid.sum(1)
    last = slice(batch - 1, batch), slice(None), slice(heads - 1, heads)
    q, k, v, g = (x[last][0, :, 0].double() for x in (query, key, value, gate))
    mean_q, mean_k, mean_v = ((x[token_of.clamp_min(0)] * valid[..., None]).sum(1) / sizes[:, None] for x in (q, k, v))
    for tile in (0, 7, grid.num_tiles // 2, grid.num_tiles - 1):
        rows = token_of[tile][valid[tile]]
        kept = indices[-1, -1, tile].long()
        keys = token_of[kept][valid[kept]]
        logits, values = problem.scale * q[rows] @ k[keys].T, v[keys]
        if combine == "merge":
            far = torch.ones(grid.num_tiles, dtype=torch.bool, device="cuda")
            far[kept] = False
            logits = torch.cat([logits, problem.scale * q[rows] @ mean_k[far].T + sizes[far].log()], 1)
            values = torch.cat([values, mean_v[far]])
        right = logits.softmax(1) @ values
        if combine == "gate":
            right += g[rows] * ((problem.scale * mean_q[tile] @ mean_k.T).softmax(0) @ mean_v)
        assert relative_error(output[-1, rows, -1], right) < 1e-2


def test_the_same_call_gives_the_same_bits():
    query, key, value, gate = (randn(1, 21 * 30 * 52, 4, 128) for _ in range(4))
    for options in ({"gate": gate}, {"combine": "merge"}):
        outputs = [triton(query, key, value, (21, 30, 52), top_k_ratio=0.2, **options) for _ in range(5)]
        assert all(torch.equal(outputs[0], output) for output in outputs[1:])


def test_the_host_never_waits():
    query, key, value, gate = (randn(1, 6144 + 8, 4, 128) for _ in range(4))
    mask = torch.ones(1, 8, dtype=torch.bool, device="cuda")
    options = {"gate": gate, "top_k_ratio": 0.2, "context_tokens": (3, 5), "context_mask": mask}
    triton(query, key, value, (16, 16, 24), **options)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        triton(query, key, value, (16, 16, 24), **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("shapes", [[(8, 16, 20), (8, 20, 24), (12, 24, 28)], [(9, 18, 22), (5, 21, 35), (10, 17, 29)]])
def test_a_new_size_compiles_nothing(shapes):
    kernels = (pool.pool_kernel, coarse.coarse_kernel, top_k.top_k_kernel, sparse.sparse_forward_kernel)

    def compiled():
        return [len(kernel.device_caches[0][0]) for kernel in kernels]

    counts = []
    for T, H, W in shapes:
        query, key, value = (randn(1, T * H * W, 2, 128) for _ in range(3))
        triton(query, key, value, (T, H, W), top_k=11, combine="merge")
        counts.append(compiled())
    assert counts[0] == counts[1] == counts[2]


def test_it_compiles_without_graph_break():
    def layer(query, key, value):
        return triton(query, key, value, (5, 12, 16), top_k_ratio=0.5, combine="merge") + 1

    query, key, value = (randn(1, 960, 2, 64) for _ in range(3))
    assert torch.equal(torch.compile(layer, fullgraph=True)(query, key, value), layer(query, key, value))


def test_it_runs_inside_a_cuda_graph():
    query, key, value = (randn(1, 6144, 4, 128) for _ in range(3))

    def call():
        return triton(query, key, value, (16, 16, 24), top_k_ratio=0.2, combine="merge")

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        eager = call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call()
    output.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(output, eager)


@pytest.mark.parametrize("combine", ["gate", "merge"])
def test_registration_passes_opcheck(combine):
    query, key, value, gate = (randn(2, 63, 2, 32, dtype=torch.float32).requires_grad_() for _ in range(4))
    mask = torch.ones(2, 3, dtype=torch.bool, device="cuda")
    numbers = ([3, 4, 5], [2, 2, 2], 3, combine, 0.2, 1, 2, "mean", "triton")
    given = gate if combine == "gate" else None
    torch.library.opcheck(torch.ops.vsa_diffusers.attention.default, (query, key, value, given, mask, *numbers))


@pytest.mark.xdist_group("large")
@pytest.mark.parametrize("ratio", [0.5, 0.1])
def test_extra_memory_is_at_most_that_of_key_and_value(ratio):
    query, key, value, gate = (randn(1, 75_600, 24, 128) for _ in range(4))
    triton(query, key, value, (21, 45, 80), top_k_ratio=ratio, gate=gate)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    output = triton(query, key, value, (21, 45, 80), top_k_ratio=ratio, gate=gate)
    extra = torch.cuda.max_memory_allocated() - before - output.nbytes
    assert extra <= key.nbytes + value.nbytes


def test_a_dtype_that_the_kernels_do_not_take_is_an_error_with_the_mend():
    query = randn(1, 64, 1, 32, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"not torch\.float64; cast the inputs"):
        triton(query, query, query, (4, 4, 4))
