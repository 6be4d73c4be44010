import datetime
import json

import pytest
import torch

from vsa_diffusers.bench import layers, report
from vsa_diffusers.bench.layers import Settings, measure_shape
from vsa_diffusers.bench.measure import Measurement, machine, measure
from vsa_diffusers.bench.shapes import CPU_SHAPE, SHAPES, parse

SMALL = "1x1x4x8x8x16"
on_cpu = pytest.mark.skipif(
    torch.cuda.is_available(),
    reason="runs where torch sees no GPU (CUDA_VISIBLE_DEVICES= pytest): with one, other things are measured",
)


@on_cpu
@pytest.mark.parametrize("backward", [False, True])
def test_it_measures_dense_and_every_mode(backward):
    rows = list(measure_shape(parse(SMALL), Settings(ratios=[0.5], combines=["gate", "merge"], backward=backward)))
    assert [row["what"] for row in rows] == ["dense flash", "torch gate", "torch merge"]
    assert all(row["ms"] > 0 for row in rows)
    assert rows[0]["speedup"] == 1
    assert json.loads(json.dumps(rows)) == rows


@on_cpu
def test_what_cannot_run_is_a_row_with_the_reason():
    settings = Settings(ratios=[0.5, 0.2], combines=["merge"], implementations=["torch", "triton"])
    rows = list(measure_shape(parse(SMALL), settings))
    skipped = [row for row in rows if "skipped" in row]
    assert [(row["what"], row["ratio"]) for row in skipped] == [("triton merge", 0.5), ("triton merge", 0.2)]
    assert "the kernels cannot run here" in skipped[0]["skipped"]


@on_cpu
def test_without_a_gpu_the_shape_has_enough_tokens_to_mean_something():
    assert layers.chosen_shapes(None) == [CPU_SHAPE]
    assert CPU_SHAPE.tokens == 4096


def row(what, ratio, ms, dense=10.0):
    return {"what": what, "ratio": ratio, "ms": ms, "speedup": dense / ms}


def test_a_verdict_tells_the_fastest_and_what_is_not_faster():
    dense = row("dense cudnn", None, 10.0)
    assert report.verdict([dense, row("triton merge", 0.5, 8.0), row("triton merge", 0.2, 4.0)]) == (
        "triton merge at 0.2 is 2.50 times as fast as dense cudnn (10 ms), and all settings are faster."
    )
    assert "and 1 of 2 settings are not faster" in report.verdict([dense, row("x", 0.5, 12.0), row("x", 0.2, 4.0)])
    assert "Nothing is faster than dense cudnn (10 ms)" in report.verdict([dense, row("x", 0.5, 12.0)])
    assert "no sparse attention ran" in report.verdict([dense, {"what": "x", "ratio": 0.5, "skipped": "why"}])
    assert "no dense attention ran" in report.verdict([{"what": "dense cudnn", "ratio": None, "skipped": "why"}])


def test_memory_is_in_millions_of_bytes_as_the_heading_says():
    nothing = dict.fromkeys(name for name, _, _ in report.COLUMNS.values())
    assert report.cells(nothing | {"extra_bytes": 130_008_064})["extra MB"] == "130"
    assert set(report.cells(nothing).values()) == {""}


def test_every_column_that_is_shown_is_explained():
    full = {name: 1.0 for name, _, _ in report.COLUMNS.values()}
    legend = report.legend([full])
    assert all(f"{column}: " in legend for column in report.COLUMNS if column != "what")
    assert "launches" not in report.legend([full | {"launches": None}])


def test_the_same_reason_is_told_once_for_all_ratios():
    rows = [{"what": "x", "ratio": ratio, "skipped": "no GPU"} for ratio in (0.5, 0.2)]
    assert report.skipped(rows).row_count == 1


def test_a_call_of_seconds_is_measured_once_on_a_cpu(monkeypatch):
    monkeypatch.setattr("vsa_diffusers.bench.measure.CPU_LONG_MS", -1.0)
    calls = []
    result = measure(lambda: calls.append(1), "cpu")
    assert isinstance(result, Measurement)
    assert (len(calls), result.rounds) == (1, [result.ms])


def test_it_draws_the_speed_ups(tmp_path):
    pytest.importorskip("matplotlib", reason="runs with matplotlib installed: pip install '.[report]'")
    rows = [row("x", 0.5, 8.0), row("x", 1.0, 12.0), {"what": "y", "ratio": 0.5, "skipped": "why"}]
    report.plot([{"shape": "small", **each} for each in rows], tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 0


def test_a_shape_is_a_name_or_six_numbers():
    assert parse("ltx2-512p") is SHAPES["ltx2-512p"]
    assert parse("2x3x4x5x6x64").video_shape == (4, 5, 6)
    with pytest.raises(ValueError, match="shape 'wan' is neither one of"):
        parse("wan")


def test_json_says_on_what_and_when_it_was_measured(monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", {"triton": "3.7.1"}.__getitem__)
    expected = {"device": "cpu", "torch": torch.__version__, "triton": "3.7.1"}
    assert machine("cpu") == expected | {"date": datetime.date.today().isoformat()}
