"""FastH3's attention against its definition: gates over tiles of text, conditions and audio with the video."""

import math

import pytest
import torch

from oracle import fasth3, relative_error
from vsa_diffusers import video_sparse_attention
from vsa_diffusers.coarse import add_packed_coarse, add_packed_coarse_op, packed_coarse

SEGMENTS, GRID, TOP_K = (5, 70), (5, 4, 6), 2
ROWS = (0, 4, 74, 75, 194)
PUBLISHED = {
    "definition": ((0.083520, 0.063104, -0.035338, -0.041552, 0.056493), 14.13317962, 41.08575219),
    "sparse": ((0.019792, 0.020991, 0.011330, 0.013713, 0.025193), 12.71037786, 13.77321717),
    "gate": ((0.019792, 0.020991, 0.011330, -0.007706, 0.036029), 12.84264038, 14.98804666),
}


def numbers(dtype=torch.float64):
    """The inputs `[1, 195, 1, 4]` by which the definition was published."""
    rows = sum(SEGMENTS) + math.prod(GRID)
    a = torch.arange(1, 4 * rows + 1, dtype=torch.float64)
    inputs = (2 * (0.37 * a).sin(), 2 * (0.23 * a).cos(), (0.11 * a).sin(), 0.5 * (0.05 * a).cos())
    return [x.view(1, rows, 1, 4).to(dtype) for x in inputs]


def random(segments=SEGMENTS, grid=GRID, heads=2, dim=8, batch=2):
    torch.manual_seed(0)
    rows = sum(segments) + math.prod(grid)
    return [torch.randn(batch, rows, heads, dim, dtype=torch.float64) * scale for scale in (2, 2, 1, 0.5)]


def sparse(q, k, v, segments=SEGMENTS, grid=GRID, top_k=TOP_K):
    context = (sum(segments), 0)
    return video_sparse_attention(q, k, v, grid, top_k=top_k, combine="sparse", context_tokens=context)


def ours(q, k, v, gate, segments=SEGMENTS, grid=GRID, top_k=TOP_K):
    return sparse(q, k, v, segments, grid, top_k) + gate * packed_coarse(q, k, v, segments, grid, (4, 4, 4))


def test_the_published_numbers_come_out():
    q, k, v, gate = numbers()
    kind = dict(top_k=TOP_K, combine="gate", context_tokens=(75, 0))
    definition, kept = fasth3(q, k, v, gate, SEGMENTS, GRID, top_k=TOP_K)
    outputs = {
        "definition": [definition, ours(q, k, v, gate)],
        "sparse": [sparse(q, k, v)],
        "gate": [video_sparse_attention(q, k, v, GRID, gate=gate, **kind)],
    }
    for name, found in outputs.items():
        rows, total, absolutes = PUBLISHED[name]
        for output in found:
            torch.testing.assert_close(output[0, ROWS, 0, 0], torch.tensor(rows).double(), atol=6e-7, rtol=0)
            assert abs(float(output.sum()) - total) < 6e-9
            assert abs(float(output.abs().sum()) - absolutes) < 6e-9
    assert [row.nonzero().flatten().tolist() for row in kept[0, 0, 3:, 3:]] == [[0, 2], [1, 3], [1, 3], [1, 3]]


@pytest.mark.parametrize("segments", [(), (5, 70), (7, 0, 130), (64, 128, 1)])
def test_output_and_gradients_equal_the_definition(segments):
    inputs = [x.requires_grad_() for x in random(segments)]
    output = ours(*inputs, segments)
    expected, _ = fasth3(*inputs, segments, GRID, top_k=TOP_K)
    assert relative_error(output, expected) < 1e-12
    weight = torch.randn_like(output)
    found = torch.autograd.grad(output, inputs, weight)
    for name, gradient, wanted in zip(
        ("query", "key", "value", "gate"), found, torch.autograd.grad(expected, inputs, weight), strict=True
    ):
        assert relative_error(gradient, wanted) < 1e-11, name


def test_without_a_prefix_it_is_the_gated_operation():
    q, k, v, gate = random(())
    expected = video_sparse_attention(q, k, v, GRID, top_k=TOP_K, gate=gate)
    assert relative_error(ours(q, k, v, gate, ()), expected) < 1e-13


def test_a_prefix_makes_it_another_thing_than_the_gated_operation():
    q, k, v, gate = random()
    output = ours(q, k, v, gate)
    today = video_sparse_attention(q, k, v, GRID, top_k=TOP_K, gate=gate, context_tokens=(75, 0))
    for rows in (slice(75), slice(75, None)):
        assert relative_error(today[:, rows], output[:, rows]) > 1e-2


def test_without_a_gate_it_is_the_sparse_branch_and_with_all_tiles_dense_attention():
    q, k, v, gate = random()
    assert fasth3(q, k, v, 0 * gate, SEGMENTS, GRID, top_k=TOP_K)[0].allclose(sparse(q, k, v), atol=1e-13)
    dense = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    assert ours(q, k, v, 0 * gate, top_k=99).allclose(dense, atol=1e-13)
    assert relative_error(ours(q, k, v, gate, top_k=99), dense) > 1e-2


def test_where_segments_end_matters_to_the_gate_alone():
    q, k, v, gate = random()
    assert relative_error(ours(q, k, v, gate, (75,)), ours(q, k, v, gate, (5, 70))) > 1e-3
    assert ours(q, k, v, 0 * gate, (75,)).equal(ours(q, k, v, 0 * gate, (5, 70)))


def test_a_value_that_all_rows_share_comes_back_gated_in_every_row():
    q, k, v, gate = random()
    v = v[:, :1].expand_as(v)
    torch.testing.assert_close(ours(q, k, v, gate), (1 + gate) * v, atol=1e-12, rtol=0)


def test_the_order_of_rows_within_a_prefix_tile_is_that_of_the_output():
    inputs = random()
    order = torch.arange(inputs[0].shape[1])
    order[5:69] = 5 + torch.randperm(64)
    found = ours(*(x[:, order] for x in inputs))
    torch.testing.assert_close(found, ours(*inputs)[:, order], atol=1e-12, rtol=0)


def test_sums_of_sixteen_bit_rows_are_kept_in_fp32():
    q, k, v, _ = random(dim=32)
    coarse = packed_coarse(*(x.bfloat16() for x in (q, k, v)), SEGMENTS, GRID, (4, 4, 4))
    exact = packed_coarse(*(x.bfloat16().double() for x in (q, k, v)), SEGMENTS, GRID, (4, 4, 4))
    assert coarse.dtype == torch.bfloat16
    torch.testing.assert_close(coarse, exact.bfloat16(), atol=0, rtol=2**-7)


def test_gate_times_coarse_is_added_to_the_sparse_branch():
    q, k, v, gate = random()
    exact = sparse(q, k, v)
    found = add_packed_coarse(exact, gate.float(), q, k, v, SEGMENTS, GRID, (4, 4, 4))
    assert relative_error(found, exact + gate.float() * packed_coarse(q, k, v, SEGMENTS, GRID, (4, 4, 4))) < 1e-13


def test_the_operator_tells_a_compiler_what_it_returns():
    q, k, v, gate = (x.float() for x in random())
    arguments = (torch.randn_like(q), gate, q, k, v, list(SEGMENTS), list(GRID), [4, 4, 4], "auto")
    torch.library.opcheck(add_packed_coarse_op, arguments, test_utils=("test_schema", "test_faketensor"))
    assert add_packed_coarse_op(*arguments).equal(add_packed_coarse(*arguments))


@pytest.mark.slow
def test_compiled_it_is_the_same_with_any_segments():
    compiled = torch.compile(packed_coarse, backend="aot_eager", fullgraph=True, dynamic=True)
    for segments in ((5, 70), (9, 71), (3, 150)):
        q, k, v, _ = random(segments)
        expected = packed_coarse(q, k, v, segments, GRID, (4, 4, 4))
        torch.testing.assert_close(compiled(q, k, v, segments, GRID, (4, 4, 4)), expected, atol=1e-12, rtol=0)
