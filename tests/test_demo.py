"""`make demo`, on a small video."""

import json
from pathlib import Path

import demo
import imageio.v3 as imageio

MODEL = Path(__file__).parents[1] / "examples" / "tiny_wan"


def test_it_compares_dense_and_sparse_and_writes_video_sheet_and_numbers(tmp_path, capsys):
    model = tmp_path / "model"
    model.mkdir()
    for part in MODEL.iterdir():
        (model / part.name).symlink_to(part)
    recommended = json.loads((MODEL / "recommended.json").read_text())
    (model / "recommended.json").unlink()
    (model / "recommended.json").write_text(json.dumps(recommended | dict(height=64, width=64, num_frames=29)))
    options = dict(prompt=None, ratios=[1.0, 0.5], dense_steps=0.5, selection="quarters", steps=2, seed=None)
    demo.main(**options, output=tmp_path / "out", model=model)

    numbers = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (numbers["tokens"], numbers["tiles"], numbers["padding"]) == (128, 2, 0)
    dense, whole, half = numbers["results"]
    assert (dense["kept_tiles"], whole["kept_tiles"], half["kept_tiles"]) == (2, 2, 1)
    assert whole["psnr"] > 60 > half["psnr"]
    assert imageio.imread(tmp_path / "out" / "side_by_side.mp4").shape == (29, 64, 3 * 64, 3)
    assert imageio.imread(tmp_path / "out" / "contact_sheet.png").shape[2] in {3, 4}
    assert "VSA 0.5" in capsys.readouterr().out
