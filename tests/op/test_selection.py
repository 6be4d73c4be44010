"""The rules that `examples/research/vsa_selection.py` compares, and its sums."""

import json

import pytest
import torch
from clips_wan import HELD_OUT_FRAMES, Clip, build_clips_transformer, save_clips_model
from selection_rules import (
    BY_QUARTERS,
    EXACT,
    MEAN,
    QUARTERS,
    RULES,
    attention_by_choice,
    best,
    compare_roundings,
    compare_rules,
    highest_pair,
    selecting,
    to_bf16,
    to_tf32,
)
from typer.testing import CliRunner
from vsa_selection import between, equal_ratios, main, mean_of

from vsa_diffusers import video_sparse_attention
from vsa_diffusers.cli.script import script_app
from vsa_diffusers.tiles import TileGrid

GRID = TileGrid((8, 8, 12), (4, 4, 4))
SELECTIONS = {"mean": MEAN, "quarters": BY_QUARTERS}


@pytest.fixture
def sequences():
    """Query, key and value `[tokens, head_dim]`."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(GRID.num_tokens, 16, generator=generator) for _ in range(3)]


@pytest.fixture
def call(sequences):
    """The same in tiles."""
    return [x[GRID.token_index()] for x in sequences]


def attend(sequences, **options):
    query, key, value = (x[None, :, None] for x in sequences)
    return video_sparse_attention(query, key, value, GRID.video_shape, top_k=3, **options)[0, :, 0]


@pytest.mark.parametrize("name", RULES)
def test_every_rule_finds_a_tile_that_all_queries_look_at(name, call):
    query, key, _ = call
    key[5] += query.flatten(0, 1).mean(0) / query.flatten(0, 1).mean(0).norm()
    query += 6 * query.flatten(0, 1).mean(0) / query.flatten(0, 1).mean(0).norm()
    scores = RULES[name](query, key, GRID)
    assert scores.shape == (GRID.num_tiles, GRID.num_tiles)
    assert (scores.argmax(1) == 5).all()


def test_no_rule_keeps_more_mass_than_the_exact_one(call):
    found = compare_rules(call, GRID, [0.25, 0.5])
    for (rule, ratio), measures in found.items():
        assert 0 < measures["mass"] <= found[EXACT, ratio]["mass"] + 1e-6, rule
    assert found[MEAN, 0.25]["mass"] < found[EXACT, 0.25]["mass"]


@pytest.mark.parametrize("selection", SELECTIONS)
def test_a_rule_named_after_a_selection_is_what_the_operator_does(selection, sequences, call):
    kept = best(RULES[SELECTIONS[selection]](*call[:2], GRID), 3)
    found = attention_by_choice(*call, kept[None])
    dense = torch.nn.functional.scaled_dot_product_attention(*(x[None] for x in sequences))[0]
    for combine in ("merge", "sparse"):
        expected = (attend(sequences, combine=combine, selection=selection) - dense).norm() / dense.norm()
        torch.testing.assert_close(found[combine][0], expected, rtol=1e-4, atol=0)


def test_the_operator_keeps_what_a_rule_says_while_it_is_selecting(sequences):
    usual = attend(sequences, combine="merge", selection="mean")
    with selecting(RULES[BY_QUARTERS]):
        ours = attend(sequences, combine="merge", selection="mean")
    assert not torch.allclose(ours, usual, atol=1e-3)
    torch.testing.assert_close(ours, attend(sequences, combine="merge", selection="quarters"))
    torch.testing.assert_close(attend(sequences, combine="merge", selection="mean"), usual)


def test_tf32_keeps_eleven_bits_of_a_number_and_bf16_eight():
    x = torch.randn(1000)
    for rounding, error in ((to_tf32, 2.0**-10), (to_bf16, 2.0**-8)):
        assert 0.4 * error < ((rounding(x) - x) / x).abs().max() <= error
        assert torch.equal(rounding(rounding(x)), rounding(x))


def test_rounding_changes_what_is_kept_where_means_cannot_be_told_apart_any_more(call):
    found = compare_roundings([10 * call[0], *call[1:]], GRID, 0.25)
    assert found["quarters", "fp32"]["changed"] == 0
    near = call[1].clone()
    near[1:] = near[:1] * (1 + 1e-3 * torch.rand(GRID.num_tiles - 1, 1, 1))
    found = compare_roundings([call[0], near, call[2]], GRID, 0.25)
    for means in ("mean", "quarters", "eighths"):
        assert found[means, "bf16"]["changed"] > found[means, "tf32"]["changed"] >= found[means, "fp32"]["changed"]
        assert found[means, "bf16"]["changed"] > 0.1


def test_more_blocks_than_the_tile_can_tell_nothing_else(call):
    """A tile cut in two along each axis, of tokens that are equal along time, is a tile cut into quarters."""
    query, key, _ = (x.unflatten(1, (4, 16))[:, :1].expand(-1, 4, -1, -1).flatten(1, 2) for x in call)
    quarters, eighths = (highest_pair(parts, parts)(query, key, GRID) for parts in (QUARTERS, (2, 2, 2)))
    torch.testing.assert_close(quarters, eighths)


def test_means_are_over_pairs_of_each_ones_mean():
    rows = [{"rule": "a", "pair": pair, "x": x} for pair, x in ((0, 1.0), (0, 3.0), (1, 4.0))]
    assert mean_of(rows, ("rule",), ("x",)) == [{"rule": "a", "pairs": 2, "x": 3.0, "x_standard_error": 1.0}]
    assert mean_of(rows[:2], ("rule",), ("x",))[0]["x_standard_error"] is None


def test_the_ratio_of_equal_error_lies_on_the_line_between_those_measured():
    assert between([(0.4, 0.1), (0.2, 0.2), (0.1, 0.3)], 0.15) == pytest.approx(0.25)
    assert between([(0.4, 0.1), (0.2, 0.2)], 0.5) is None
    errors = {BY_QUARTERS: (0.4, 0.2), "other": (0.3, 0.1)}
    rows = [
        {"rule": rule, "ratio": ratio, "pair": 0, "merge": error}
        for rule, both in errors.items()
        for ratio, error in zip((0.1, 0.3), both, strict=True)
    ]
    found = {(row["rule"], row["ratio"]): row["equal"] for row in equal_ratios(rows, [0.1, 0.3], "merge")}
    assert found == pytest.approx({(BY_QUARTERS, 0.1): 0.1, (BY_QUARTERS, 0.3): 0.3, ("other", 0.3): 0.2})


@pytest.mark.slow
def test_the_whole_comparison(tmp_path):
    frames = torch.randint(0, 256, (2 * HELD_OUT_FRAMES, 3, 144, 160), dtype=torch.uint8)
    transformer = build_clips_transformer(layers=2, heads=1)
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.02)
    save_clips_model(tmp_path / "model", transformer, [Clip("noise", frames)], steps=0)
    words = {"model": tmp_path / "model", "grid": "8x8x8", "pairs": 2, "steps": 2, "every": 2, "ratios": "0.2,0.5",
             "video-pairs": 1, "video-steps": 1, "video-ratios": "0.25", "held-out": 2, "device": "cpu",
             "json": tmp_path / "found.json"}  # fmt: skip
    words = [f"--{name}={value}" for name, value in words.items()]
    result = CliRunner().invoke(script_app(main), words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "found.json").read_text())
    assert {(row["rule"], row["ratio"]) for row in found["rules"]} == {
        (rule, at) for rule in RULES for at in (0.2, 0.5)
    }
    assert {row["layer"] for row in found["rules_by_layer"]} == {0, 1}
    assert {row["step"] for row in found["rules_by_step"]} == {1}
    assert all(row["pairs"] == 2 and 0 < row["mass"] <= 1 for row in found["rules"])
    assert {row["inputs"] for row in found["roundings"]} == {"clips", "random, 1", "random, 4", "random, 16"}
    assert [row["ratio"] for row in found["videos"]] == [0.25] * 5
    losses = {row["rule"]: row for row in found["losses"]}
    assert len(losses) == 5
    assert all(row["pairs"] == 2 and row["distance"] > 0 for row in losses.values())
    refused = CliRunner().invoke(script_app(main), ["--model", str(tmp_path / "model"), "--grid", "6x8x8"])
    assert refused.exit_code != 0
