"""The coarse branch of a packed sequence by its kernels against fp64, in a process of its own (`conftest.py`)."""

import itertools
import math

import pytest
import torch

from checks import some
from oracle import relative_error
from vsa_diffusers.coarse import add_packed_coarse, packed_coarse
from vsa_diffusers.kernels import packed

TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
CASES = {
    "text, condition and video": ((5, 70), (5, 4, 6), (4, 4, 4), 2, 32),
    "no prefix": ((), (4, 4, 8), (4, 4, 4), 1, 16),
    "an empty segment": ((7, 0, 130), (3, 5, 9), (4, 4, 4), 1, 64),
    "whole segments": ((64, 128, 1), (4, 8, 4), (4, 4, 4), 2, 16),
    "a block of 60": ((61,), (7, 9, 11), (3, 4, 5), 1, 24),
    "one row": ((1,), (1, 1, 1), (4, 4, 4), 2, 128),
    "a head_dim of 40": ((9,), (5, 6, 7), (2, 8, 8), 3, 40),
}


def inputs(segments, grid, batch, dim, dtype, scale=1.0, heads=2):
    """Exact output, gate, query, key and value, with other strides than they would have by themselves."""
    torch.manual_seed(0)
    rows = sum(segments) + math.prod(grid)
    tensors = [torch.randn(batch, heads, rows, dim) * scale for _ in range(5)]
    return [x.to(dtype).transpose(1, 2) for x in tensors]


@pytest.fixture(autouse=True)
def _fresh_memory_is_nan(monkeypatch):
    def poisoned(function):
        def filled(*args, **kwargs):
            made = function(*args, **kwargs)
            return made.fill_(math.nan) if made.is_floating_point() else made

        return filled

    monkeypatch.setattr(packed.torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


@pytest.mark.parametrize("call", some(itertools.product(CASES, TOLERANCE), every=4), ids="{0[0]}, {0[1]}".format)
def test_every_segment_grid_block_and_dtype_matches_fp64(call):
    case, dtype = call
    segments, grid, block, batch, dim = CASES[case]
    tensors = inputs(segments, grid, batch, dim, dtype)
    exact, gate, query, key, value = (x.double() for x in tensors)
    expected = exact + gate * packed_coarse(query, key, value, segments, grid, block)
    found = packed.add_packed_coarse(*tensors, segments, grid, block)
    assert found.dtype == dtype
    assert found.is_contiguous()
    assert relative_error(found, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("scale", [1, 4, 16])
def test_larger_inputs_match_fp64(scale):
    segments, grid, block, batch, dim = CASES["text, condition and video"]
    tensors = inputs(segments, grid, batch, dim, torch.float32, scale)
    exact, gate, query, key, value = (x.double() for x in tensors)
    expected = exact + gate * packed_coarse(query, key, value, segments, grid, block)
    assert relative_error(packed.add_packed_coarse(*tensors, segments, grid, block), expected) < 1e-5


def test_a_row_belongs_to_one_tile_and_a_tile_has_its_rows():
    tiles, tile_of_row = packed.tables((7, 0, 130), (3, 5, 9), (4, 4, 4), torch.device("cpu"))
    rows = tiles[tiles >= 0]
    assert rows.sort().values.tolist() == list(range(7 + 130 + 3 * 5 * 9))
    number = torch.arange(len(tiles))[:, None].expand_as(tiles)
    assert tile_of_row[rows.long()].equal(number[tiles >= 0].int())


def test_recorded_gradients_and_an_explicit_choice_stay_with_pytorch(monkeypatch):
    monkeypatch.setattr(packed, "add_packed_coarse", lambda *_: pytest.fail("the kernels have no gradient"))
    segments, grid, block, batch, dim = CASES["text, condition and video"]
    tensors = [x.requires_grad_() for x in inputs(segments, grid, batch, dim, torch.float32)]
    add_packed_coarse(*tensors, segments, grid, block).sum().backward()
    assert all(x.grad is not None for x in tensors)
    with torch.no_grad():
        add_packed_coarse(*tensors, segments, grid, block, "torch")
