import json

import pytest
import torch

from vsa_diffusers.bench import report
from vsa_diffusers.bench.__main__ import main
from vsa_diffusers.bench.shapes import SHAPES, parse


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="runs on a machine without a GPU: with one, the command measures full-size shapes"
)
@pytest.mark.parametrize("backward", [False, True])
def test_it_measures_dense_and_every_mode_and_writes_json(backward, tmp_path, capsys):
    path = tmp_path / "bench.json"
    flags = ["--backward"] if backward else []
    rows = main(
        ["--shapes", "1x1x4x8x8x16", "--ratios", "0.5", "--combines", "gate", "merge", "--json", str(path), *flags]
    )
    assert [row["what"] for row in rows] == ["dense flash", "torch gate", "torch merge"]
    assert all(row["ms"] > 0 for row in rows)
    assert json.loads(path.read_text())["rows"] == rows
    assert "torch merge" in capsys.readouterr().out


def test_memory_is_in_millions_of_bytes_as_the_heading_says():
    names = ["shape", "what", "ratio", "ms", "spread", "tflops", "speedup", "extra_bytes", "launches", "cpu_us"]
    nothing = dict.fromkeys([*names, "first_ms"])
    cells = report.cells(nothing | {"extra_bytes": 130_008_064})
    assert dict(zip(report.COLUMNS, cells, strict=True))["extra MB"] == "130"
    assert report.cells(nothing) == [""] * len(report.COLUMNS)


def test_it_draws_the_speed_ups(tmp_path):
    pytest.importorskip("matplotlib", reason="runs with matplotlib installed")
    main(
        [
            "--shapes",
            "1x1x4x8x8x16",
            "--ratios",
            "0.5",
            "1.0",
            "--combines",
            "sum",
            "--selection",
            "quarters",
            "--plot",
            str(tmp_path / "a.png"),
        ]
    )
    assert (tmp_path / "a.png").stat().st_size > 0


def test_a_shape_is_a_name_or_six_numbers():
    assert parse("ltx2-512p") is SHAPES["ltx2-512p"]
    assert parse("2x3x4x5x6x64").video_shape == (4, 5, 6)
    with pytest.raises(ValueError, match="shape 'wan' is neither one of"):
        parse("wan")
