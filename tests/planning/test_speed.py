"""Speeds: measured where they were measured, close where they are interpolated, and said so."""

from types import SimpleNamespace

import pytest

from vsa_diffusers.planning import speed
from vsa_diffusers.tiles import TileGrid

RATIOS = (0.5, 0.2, 0.1)


def costs_of(row):
    return SimpleNamespace(heads=row["heads"], head_dim=row["head_dim"], width=row["heads"] * row["head_dim"])


def grid_of(row):
    return TileGrid(tuple(row["video_shape"]), tuple(row["block"]))


def estimate(row):
    return speed.expected_layer(
        row["gpu"], costs_of(row), row["batch"], grid_of(row), row["fitted"], row["combine"], RATIOS
    )


ROWS = [row for row in speed.measured()["layers"] if row["selection"] == "quarters" or row["combine"] == "gate"]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['gpu']}-{row['shape']}-{row['combine']}-{row['fitted']}")
def test_a_measured_shape_has_its_measured_speeds(row):
    layer = estimate(row)
    assert layer.measured
    assert layer.dense_ms == row["dense_ms"]
    assert {f"{ratio:g}": layer.speedup(ratio) for ratio in RATIOS} == pytest.approx(
        {f"{ratio:g}": row["speedups"][f"{ratio:g}"] for ratio in RATIOS}, rel=2e-3
    )


INNER = [row for row in ROWS if row["shape"] not in ("ltx2-512p", "cogvideox-480p", "hunyuan-720p")]


@pytest.mark.parametrize("row", INNER, ids=lambda row: f"{row['gpu']}-{row['shape']}-{row['combine']}-{row['fitted']}")
def test_a_shape_between_others_comes_out_within_a_tenth(row, monkeypatch):
    others = [each for each in speed.measured()["layers"] if each["shape"] != row["shape"]]
    monkeypatch.setattr(speed, "measured", lambda: {"layers": others})
    layer = estimate(row)
    assert layer.reach == "interpolated"
    assert not layer.measured
    assert layer.dense_ms == pytest.approx(row["dense_ms"], rel=0.1)
    for ratio in RATIOS:
        assert layer.speedup(ratio) == pytest.approx(row["speedups"][f"{ratio:g}"], rel=0.1)


@pytest.mark.parametrize(("gpu", "most"), [("H100", 0.02), ("H200", 0.04)])
def test_a_whole_model_left_out_comes_out_nearly_but_for_masked_text(gpu, most):
    errors = dict(speed.measured()["rest"][gpu]["left_out"])
    assert -0.26 < errors.pop("hunyuan-720p") < -0.15
    assert len(errors) == 5
    assert max(map(abs, errors.values())) < most


def layer_of(video_shape, head_dim=128, heads=24, ratios=RATIOS):
    costs = SimpleNamespace(heads=heads, head_dim=head_dim, width=heads * head_dim)
    return speed.expected_layer("H100", costs, 1, TileGrid(video_shape, (4, 4, 4)), True, "merge", ratios)


def test_what_is_beyond_the_measured_shapes_says_how_far():
    assert layer_of((8, 8, 8)).reach == "extrapolated: 12.0 times fewer tiles than were measured (96)"
    assert "4.0 times as many tiles as were measured (1980)" in layer_of((44, 48, 240)).reach
    assert "head_dim 96, where 64 and 128 were measured" in layer_of((16, 32, 32), head_dim=96).reach


def test_no_layer_is_faster_than_its_host():
    layer = layer_of((8, 8, 8))
    assert set(layer.sparse_ms.values()) == {layer.host_ms}
    assert layer.dense_ms < layer.host_ms


def test_a_lower_ratio_is_never_slower():
    layer = layer_of((20, 32, 48), ratios=(1.0, 0.7, 0.5, 0.4, 0.3, 0.2, 0.15, 0.1, 0.05, 0.01))
    times = list(layer.sparse_ms.values())
    assert times == sorted(times, reverse=True)
    assert times[-1] > 0


def test_the_cost_of_tiles_is_what_block_size_auto_minimises():
    assert speed.waste(TileGrid((16, 16, 24), (4, 4, 4))) == 1
    assert speed.waste(TileGrid((21, 30, 52), (4, 4, 4))) == pytest.approx(1.223, abs=1e-3)
    assert speed.waste(TileGrid((21, 30, 52), (3, 5, 4))) == pytest.approx(1.138, abs=1e-3)


def test_a_gpu_without_measurements_is_refused():
    with pytest.raises(ValueError, match="gpu='A100' has no measurements; there are some of H100, H200"):
        speed.expected_layer("A100", costs_of(ROWS[0]), 1, grid_of(ROWS[0]), True, "merge", RATIOS)
