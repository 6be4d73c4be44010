"""The rules that `examples/research/vsa_selection.py` compares."""

import pytest
import torch
from vsa_selection import RULES, exact_mass, outputs

from vsa_diffusers import video_sparse_attention
from vsa_diffusers.tiles import TileGrid

GRID = TileGrid((8, 8, 8), (4, 4, 4))


@pytest.fixture
def call():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(GRID.num_tokens, 16, generator=generator) for _ in range(3)]


@pytest.mark.parametrize("name", RULES)
def test_every_rule_shares_out_the_whole_attention(name, call):
    scores = RULES[name](*call[:2], GRID.token_index(), GRID)
    assert scores.shape == (GRID.num_tiles, GRID.num_tiles)
    assert torch.allclose(scores.sum(1), torch.ones(GRID.num_tiles), atol=1e-5)


def test_the_exact_rule_finds_where_the_attention_is(call):
    query, key, _ = call
    order = GRID.token_index()
    key[order[5]] = 3 * query.mean(0) / query.mean(0).norm() + key[order[5]]
    query += 2 * query.mean(0) / query.mean(0).norm()
    assert (exact_mass(query, key, order, GRID).argmax(1) == 5).float().mean() > 0.5


@pytest.mark.parametrize("selection", ["mean", "quarters"])
def test_a_rule_named_after_a_selection_is_what_the_operator_does(selection, call):
    order = GRID.token_index()
    tile_of = torch.empty(GRID.num_tokens, dtype=torch.long)
    tile_of[order.flatten()] = torch.arange(GRID.num_tiles).repeat_interleave(order.shape[1])
    rule = next(rule for name, rule in RULES.items() if f'selection="{selection}"' in name)
    scores = rule(*call[:2], order, GRID)
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, scores.topk(3).indices, value=True)
    for combine, ours in zip(("merge", "sparse"), outputs(*call, kept, order, tile_of), strict=True):
        query, key, value = (x[None, :, None] for x in call)
        options = {"top_k": 3, "combine": combine, "selection": selection}
        expected = video_sparse_attention(query, key, value, GRID.video_shape, **options)
        assert torch.allclose(ours, expected[0, :, 0], atol=1e-5)
