"""`selection="quarters"`: scores against the oracle, for full, partial and one-token tiles; where the option goes."""

from unittest import mock

import pytest
import torch

from oracle import quarter_numbers, quarter_scores, tile_numbers
from tiny_models import RECIPES, run
from vsa_diffusers import VSAConfig, enable_vsa, selection, video_sparse_attention
from vsa_diffusers.problem import Problem
from vsa_diffusers.tiles import TileGrid
from vsa_diffusers.torch_impl import Layout, Tiled

CASES = [
    ((4, 8, 8), (4, 4, 4)),
    ((5, 9, 11), (4, 4, 4)),
    ((6, 11, 9), (3, 5, 4)),
    ((4, 6, 21), (2, 5, 10)),
    ((3, 7, 8), (1, 3, 3)),
    ((2, 5, 9), (2, 4, 4)),
    ((1, 1, 7), (4, 4, 4)),
    ((2, 3, 5), (2, 1, 1)),
    ((2, 3, 5), (1, 1, 2)),
]


def scores_of(query, key, shape, block, before=2):
    return torch.cat(list(tiled_of(query, key, TileGrid(shape, block), before).scores()), 2)


def tiled_of(query, key, grid, before=2):
    problem = Problem(grid, 1, "merge", 0.25, before, 1, "quarters")
    return Tiled(query, key, key, None, Layout(problem, key.device, key.dtype))


def make_inputs(shape):
    generator = torch.Generator().manual_seed(0)
    size = (2, 3 + shape[0] * shape[1] * shape[2], 2, 16)
    return [torch.randn(size, generator=generator) for _ in range(2)]


@pytest.mark.parametrize(("shape", "block"), CASES, ids=str)
def test_scores_equal_the_oracle_s(shape, block):
    query, key = make_inputs(shape)
    expected = quarter_scores(query, key, shape, block, 0.25, before=2)
    assert expected.isfinite().all()
    assert torch.allclose(scores_of(query, key, shape, block).double(), expected, atol=1e-5)


@pytest.mark.parametrize(("shape", "block"), CASES[:3], ids=str)
def test_the_oracle_takes_the_best_pair_of_quarters(shape, block):
    query, key = make_inputs(shape)
    tile, quarter = tile_numbers(shape, block), quarter_numbers(shape, block)
    scores = quarter_scores(query, key, shape, block, 0.25, before=2)
    q, k = (x[1, 2:-1, 1].double() for x in (query, key))
    for row, column in ((0, 0), (1, 3), (3, 2)):
        best = -torch.inf
        for own in (q[(tile == row) & (quarter == part)] for part in range(4)):
            for other in (k[(tile == column) & (quarter == part)] for part in range(4)):
                if len(own) and len(other):
                    pairs = torch.tensor(float(len(own) * len(other)))
                    best = max(best, float(0.25 * own.mean(0) @ other.mean(0) + pairs.log()))
        assert float(scores[1, 1, row, column]) == pytest.approx(best, abs=1e-6)


def test_scores_are_made_a_chunk_at_a_time(monkeypatch):
    query, key = make_inputs((5, 9, 11))
    whole = scores_of(query, key, (5, 9, 11), (2, 3, 3))
    monkeypatch.setattr(selection, "MIN_CHUNK_BYTES", 2**15)
    grid = TileGrid((5, 9, 11), (2, 3, 3))
    chunks = list(tiled_of(query, key, grid).scores())
    assert len(chunks) > 5
    assert torch.allclose(torch.cat(chunks, 2), whole, atol=1e-6)


def test_a_tile_that_matches_in_one_quarter_is_kept():
    query, key, value = (torch.zeros(1, 8 * 8 * 8, 1, 16) for _ in range(3))
    grid = TileGrid((8, 8, 8), (4, 4, 4))
    tokens = grid.token_index()[5].reshape(4, 4, 4)
    query[..., 0] = 4.0
    key[:, tokens[:, :2, :2].flatten(), :, 0], key[:, tokens[:, 2:, 2:].flatten(), :, 0] = 8.0, -9.0
    value[:, tokens.flatten()] = 1.0
    options = {"top_k": 1, "combine": "sparse"}
    assert video_sparse_attention(query, key, value, (8, 8, 8), **options).max() == 0
    assert video_sparse_attention(query, key, value, (8, 8, 8), selection="quarters", **options).min() > 0.99


def test_the_configuration_reaches_the_operator():
    recipe = RECIPES[0]
    model = enable_vsa(recipe.build(), config=VSAConfig(selection="quarters"))
    with mock.patch("vsa_diffusers.processor.video_sparse_attention", wraps=video_sparse_attention) as op:
        run(model, recipe, (5, 10, 12))
    assert {call.kwargs["selection"] for call in op.call_args_list} == {"quarters"}
