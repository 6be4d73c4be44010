"""`make demo`, on a small video."""

import json
from pathlib import Path

import demo
import imageio.v3 as imageio
import numpy as np
import pytest
import torch
import typer
from diffusers import WanPipeline
from typer.testing import CliRunner

from vsa_diffusers import enable_vsa, save_vsa

MODEL = Path(__file__).parents[2] / "examples" / "tiny_wan"
OPTIONS = dict(prompt=None, ratios=[0.5], dense_steps=0.5, dense_layers=[], selection="auto", steps=2, seed=None)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The shipped model, but for the size of its videos."""
    model = tmp_path_factory.mktemp("model")
    for part in MODEL.iterdir():
        (model / part.name).symlink_to(part)
    recommended = json.loads((MODEL / "recommended.json").read_text())
    (model / "recommended.json").unlink()
    (model / "recommended.json").write_text(json.dumps(recommended | dict(height=64, width=64, num_frames=29)))
    return model


@pytest.fixture
def made(monkeypatch):
    """The videos of the last call, as they were before compression."""
    videos, write = [], demo.write_side_by_side

    def keep(path, new):
        videos[:] = new
        write(path, new)

    monkeypatch.setattr(demo, "write_side_by_side", keep)
    return videos


def save_fine_tuned(folder: Path, change: float) -> Path:
    """A stand-in for fine-tuned weights: the shipped ones, each changed by about that share of it."""
    transformer = WanPipeline.from_pretrained(MODEL, local_files_only=True).transformer
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.mul_(1 + change * torch.randn(parameter.shape, generator=generator))
    return save_vsa(enable_vsa(transformer, 0.5), folder, dtype=torch.float16)


def test_it_compares_dense_and_sparse_and_writes_video_sheet_and_numbers(model, tmp_path, capsys):
    options = OPTIONS | dict(selection="quarters", dense_steps=0)
    demo.main(**options, output=tmp_path, model=model)

    numbers = json.loads((tmp_path / "results.json").read_text())
    assert (numbers["tokens"], numbers["tiles"], numbers["padding"]) == (128, 2, 0)
    assert numbers["fine_tuned"] is None
    dense, front, constant = numbers["results"]
    assert (dense["kept_tiles"], front["kept_tiles"], constant["kept_tiles"]) == (2, 1, 1)
    assert 0.999 > front["ssim"] > constant["ssim"]  # two tiles at the first of two steps, where the other has one
    assert front["psnr"] < 50
    assert imageio.imread(tmp_path / "side_by_side.mp4").shape == (29, 64, 3 * 64, 3)
    assert imageio.imread(tmp_path / "contact_sheet.png").shape[2] in {3, 4}
    assert "VSA 0.5, constant" in capsys.readouterr().out


def test_fine_tuned_weights_make_one_more_video_and_change_no_other(model, made, tmp_path, capsys):
    tuned = save_fine_tuned(tmp_path / "tuned", change=0.05)
    demo.main(**OPTIONS, output=tmp_path, model=model)
    dense, free, _ = made
    demo.main(**OPTIONS, fine_tuned=tuned, output=tmp_path, model=model)

    assert np.array_equal(made[0], dense)
    assert np.array_equal(made[1], free)
    assert not np.array_equal(made[3], free)
    numbers = json.loads((tmp_path / "results.json").read_text())
    assert [result["label"] for result in numbers["results"]] == [
        "dense", "VSA 0.5", "VSA 0.5, constant", "VSA 0.5, fine-tuned",
    ]  # fmt: skip
    assert (numbers["results"][3]["ratio"], numbers["results"][3]["kept_tiles"]) == (0.5, 1)
    assert (numbers["fine_tuned"]["top_k_ratio"], numbers["fine_tuned"]["dense_steps"]) == (0.5, 0.5)
    assert imageio.imread(tmp_path / "side_by_side.mp4").shape == (29, 64, 4 * 64, 3)
    assert "VSA 0.5, fine-tuned" in capsys.readouterr().out


@pytest.mark.slow
def test_unchanged_weights_saved_as_fine_tuned_make_the_training_free_video(model, made, tmp_path):
    tuned = save_fine_tuned(tmp_path / "tuned", change=0.0)
    demo.main(**OPTIONS, fine_tuned=tuned, output=tmp_path, model=model)
    dense, free, _, fine_tuned = made
    assert np.array_equal(fine_tuned, free)
    assert not np.array_equal(fine_tuned, dense)


@pytest.mark.slow
def test_the_default_model_brings_its_fine_tuned_weights_unless_told_otherwise(model, made, monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "MODEL", model)
    monkeypatch.setattr(demo, "FINE_TUNED", save_fine_tuned(tmp_path / "tuned", change=0.05))
    options = OPTIONS | dict(ratios=[1.0], steps=1)
    demo.main(**options, output=tmp_path, model=model)
    assert len(made) == 4
    demo.main(**options, output=tmp_path, model=model, without_fine_tuned=True)
    assert len(made) == 3
    monkeypatch.setattr(demo, "MODEL", tmp_path)
    demo.main(**options, output=tmp_path, model=model)
    assert len(made) == 3


def test_a_fine_tuned_directory_that_is_not_there_is_refused():
    app = typer.Typer()
    app.command()(demo.main)
    result = CliRunner().invoke(app, ["--fine-tuned", "not_there"])
    assert result.exit_code == 2
    assert "not_there" in result.output
