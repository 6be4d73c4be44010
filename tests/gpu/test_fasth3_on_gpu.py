"""FastH3's attention on a GPU, against its definition, and what its coarse branch costs at a real size."""

import math

import pytest
import torch
import torch.nn.functional as F

from oracle import fasth3, relative_error
from vsa_diffusers import video_sparse_attention
from vsa_diffusers.coarse import _add_in_torch, add_packed_coarse

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="runs on a machine with a CUDA GPU"),
]
BLOCK = (4, 4, 4)


def attend(query, key, value, gate, segments, grid, top_k):
    context = (sum(segments), 0)
    exact = video_sparse_attention(query, key, value, grid, top_k=top_k, combine="sparse", context_tokens=context)
    return add_packed_coarse(exact, gate, query, key, value, segments, grid, BLOCK)


def inputs(segments, grid, heads, dim=128):
    torch.manual_seed(0)
    rows = sum(segments) + math.prod(grid)
    return [torch.randn(1, rows, heads, dim, device="cuda", dtype=torch.bfloat16) for _ in range(4)]


def milliseconds(call, runs=10):
    call()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(runs):
        call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / runs


def test_output_and_gradients_equal_the_definition():
    segments, grid = (5, 70, 130), (5, 8, 10)
    tensors = [x.requires_grad_() for x in inputs(segments, grid, 3)]
    output = attend(*tensors, segments, grid, 4)
    expected, _ = fasth3(*tensors, segments, grid, top_k=4)
    weight = torch.randn_like(output)
    found = torch.autograd.grad(output, tensors, weight)
    wanted = torch.autograd.grad(expected, tensors, weight.double())
    assert relative_error(output, expected) < 1e-2
    for gradient, want in zip(found, wanted, strict=True):
        assert relative_error(gradient, want) < 2e-2


@pytest.mark.parametrize("scale", [1, 4, 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("segments", [(), (5, 70, 130), (64, 1, 0)], ids=str)
def test_the_kernels_equal_the_definition(segments, dtype, scale):
    grid = (5, 8, 10)
    tensors = [(scale * x).to(dtype) for x in inputs(segments, grid, 3)]
    exact = torch.randn_like(tensors[0])
    found = add_packed_coarse(exact, tensors[3], *tensors[:3], segments, grid, BLOCK)
    wide = [x.double() for x in tensors]
    expected = _add_in_torch(exact.double(), wide[3], *wide[:3], segments, grid, BLOCK)
    assert relative_error(found, expected) < 1e-2
    compiled = torch.compile(add_packed_coarse, fullgraph=True)
    assert compiled(exact, tensors[3], *tensors[:3], segments, grid, BLOCK).equal(found)


def test_rows_of_several_videos_and_heads_in_another_order():
    segments, grid = (5, 70), (5, 8, 10)
    tensors = [x.expand(2, -1, -1, -1).transpose(1, 2).contiguous().transpose(1, 2) for x in inputs(segments, grid, 3)]
    exact = torch.randn_like(tensors[0])
    found = add_packed_coarse(exact, tensors[3], *tensors[:3], segments, grid, BLOCK)
    wide = [x.double() for x in tensors]
    expected = _add_in_torch(exact.double(), wide[3], *wide[:3], segments, grid, BLOCK)
    assert relative_error(found, expected) < 1e-2


def test_the_coarse_branch_is_a_small_part_of_a_layer_at_768p(capsys):
    segments, grid = (300, 414), (37, 24, 42)
    tensors = inputs(segments, grid, 56)
    query, key, value, gate = tensors
    dense = milliseconds(lambda: F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value))))
    arguments = (query, gate, query, key, value, segments, grid, BLOCK)  # the first stands for the sparse branch
    coarse = milliseconds(lambda: add_packed_coarse(*arguments))
    in_torch = milliseconds(lambda: _add_in_torch(*arguments))
    for ratio, top_k in (("0.2", 132), ("0.1", 66)):
        layer = milliseconds(lambda kept=top_k: attend(*tensors, segments, grid, kept))
        with capsys.disabled():
            print(
                f"\nFastH3 at {ratio}: layer {layer:.2f} ms, of which coarse and gate {coarse:.2f} (in PyTorch "
                f"{in_torch:.2f}), dense {dense:.2f}"
            )
        assert layer < dense
    assert coarse < in_torch
