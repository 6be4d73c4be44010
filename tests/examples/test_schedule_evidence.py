"""The evidence for schedules: its sampler is the pipeline's, its clips are as told, and its sums are right."""

import json
import random
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest
import schedule_evidence
import torch
from clips_wan import HELD_OUT_FRAMES, Clip, build_clips_transformer, prompts, read_clips, save_clips_model, window
from flow_sampling import sample
from schedule_evidence import Evidence, kept_shares, loss_summary, main, summary, with_gains
from schedule_models import TinyWanModel, load_evidence_model
from train_clips_wan import Phase, check_settings, train
from typer.testing import CliRunner

from tiny_wan_evaluation import generate
from tiny_wan_parts import build_scheduler
from vsa_diffusers import RatioSchedule, disable_vsa, enable_vsa
from vsa_diffusers.cli.script import script_app

TINY_WAN = Path(__file__).parents[2] / "examples" / "tiny_wan"
CPU = torch.device("cpu")
GRID = (4, 8, 8)


def clip(name="still", frames=2 * HELD_OUT_FRAMES, height=144, width=160):
    """Frames that say which they are, and where."""
    pixels = torch.zeros(frames, 3, height, width, dtype=torch.uint8)
    pixels[:, 0] = torch.arange(frames)[:, None, None]
    pixels[:, 1] = torch.arange(height)[:, None]
    pixels[:, 2] = torch.arange(width)
    return Clip(name, pixels)


@pytest.fixture(scope="module")
def clips_model(tmp_path_factory):
    """A model trained for a step or so."""
    folder = tmp_path_factory.mktemp("clips")
    torch.manual_seed(0)
    transformer = build_clips_transformer(layers=1, heads=1)
    clips = [clip("one"), clip("two")]
    before = transformer.proj_out.weight.clone()
    options = dict(minutes=1e-3, tokens=256, lr=1e-3, device=CPU)
    steps = train(clips, folder / "runs", transformer, (Phase(1.0, (GRID,)),), **options)
    assert steps >= 1
    assert not torch.equal(before, transformer.proj_out.weight)
    save_clips_model(folder / "model", transformer, clips, steps)
    return folder / "model"


def test_the_sampler_makes_the_videos_of_the_pipeline_one_by_one_or_together():
    model = TinyWanModel(TINY_WAN, torch.float32, CPU)
    model.pipe.set_progress_bar_config(disable=True)
    enable_vsa(model.transformer, schedule=RatioSchedule.ramp(1.0, 0.2), combine="merge")
    with kept_shares(model.transformer) as shares:
        size = dict(height=64, width=64, num_frames=29, num_inference_steps=2)
        videos = [generate(model.pipe, model.descriptions[pair].caption, pair, **size) for pair in (0, 1)]
    with kept_shares(model.transformer) as ours:
        embeds, negative = model.prompts([0, 1])
        noise = model.noise([0, 1], (8, 4, 4))
        latents = sample(model.transformer, model.scheduler, noise, embeds, 2, negative, model.guidance)
    torch.testing.assert_close(model.decode(latents), torch.stack(videos), atol=1e-3, rtol=1e-3)
    assert shares == [1.0, 1.0, 0.5, 0.5] * 2  # two calls a step; of two tiles one is kept
    assert ours == [1.0, 1.0, 0.5, 0.5]


def test_what_the_processors_kept_is_what_the_schedule_says():
    transformer = build_clips_transformer(layers=1, heads=1)
    enable_vsa(transformer, schedule=RatioSchedule(((0, 1.0), (0.5, 0.5), (1, 0.25))), combine="merge")
    with kept_shares(transformer) as shares:
        sample(transformer, build_scheduler(), torch.randn(1, 3, 4, 32, 64), prompts([0]), 5)
    assert shares == [1.0, 0.75, 0.5, 0.375, 0.25]  # 8 tiles


def test_windows_are_in_their_clip_and_held_out_frames_are_never_trained_on():
    whole = clip()
    seen = set()
    for seed in range(50):
        crop = (window(whole.trained_on, GRID, random.Random(seed)) + 1) * 127.5
        assert crop.shape == (3, 4, 32, 32)
        assert (crop.round()[1, 0, :, 0].diff() == 1).all()
        assert (crop.round()[2, 0, 0].diff() == 1).all()
        seen |= set(crop[0, :, 0, 0].round().int().tolist())
    assert seen <= set(range(HELD_OUT_FRAMES))
    assert len(seen) > HELD_OUT_FRAMES // 2
    assert whole.held_out[:, 0, 0, 0].tolist() == list(range(HELD_OUT_FRAMES, 2 * HELD_OUT_FRAMES))
    with pytest.raises(ValueError, match="make it smaller"):
        window(whole.frames, (4, 40, 8), random.Random(0))


def test_clips_are_read_at_one_height(tmp_path):
    frames = np.random.default_rng(0).integers(0, 255, (2 * HELD_OUT_FRAMES, 36, 45, 3), dtype=np.uint8)
    imageio.imwrite(tmp_path / "noise.webp", frames, duration=40)
    (read,) = read_clips(tmp_path)
    assert read.name == "noise"
    assert read.frames.shape == (2 * HELD_OUT_FRAMES, 3, 144, 180)
    assert read.frames.dtype == torch.uint8
    imageio.imwrite(tmp_path / "short.webp", frames[:HELD_OUT_FRAMES], duration=40)
    with pytest.raises(ValueError, match=r"short\.webp has 32 frames; clips need 64 or more"):
        read_clips(tmp_path)
    (tmp_path / "noise.mp4").touch()
    with pytest.raises(ValueError, match="has several files named noise but for their ends"):
        read_clips(tmp_path)


def test_a_grid_that_does_not_fit_is_told_before_the_training(tmp_path):
    phases = (Phase(0.99, (GRID,)), Phase(1.0, ((4, 40, 8),)))
    options = dict(minutes=0.0001, tokens=256, lr=1e-3, device=CPU)
    with pytest.raises(ValueError, match=r"grid=\(4, 40, 8\) takes \(4, 160, 32\) frames and pixels of a clip"):
        train([clip()], tmp_path, build_clips_transformer(layers=1, heads=1), phases, **options)


def test_a_training_goes_on_with_its_own_settings_only(tmp_path):
    settings = {"clips": {"one": (64, 3, 144, 160)}, "lr": 1e-3}
    check_settings(tmp_path, settings)
    check_settings(tmp_path, settings)
    with pytest.raises(ValueError, match=r"settings\.json is of a training with other values: \{'clips': \{'one': "):
        check_settings(tmp_path, settings | {"clips": {"two": (64, 3, 144, 160)}})


def test_the_model_is_saved_with_what_it_was_not_trained_on(clips_model):
    model = load_evidence_model(clips_model, CPU)
    assert "64 frames of 2 real clips and no more (one, two)" in model.described
    clean, embeds = model.held_out(GRID, 3)
    assert clean.shape == (3, 3, 4, 32, 32)
    assert ((clean[:, 0] + 1) * 127.5).round().min() >= HELD_OUT_FRAMES
    assert embeds[:, 0].argmax(1).tolist() == [0, 1, 0]
    assert torch.equal(model.noise([1], GRID)[0], model.noise([0, 1], GRID)[1])


def test_a_run_goes_on_with_what_is_missing_and_refuses_another_model(clips_model, tmp_path, monkeypatch):
    made = []
    make_videos = schedule_evidence.make_videos
    monkeypatch.setattr(schedule_evidence, "make_videos", lambda *args: made.append(args[3]) or make_videos(*args))
    monkeypatch.setattr(schedule_evidence, "LEVELS", 2)
    monkeypatch.setattr(schedule_evidence, "MEANS", (0.125,))
    constant = {name: schedule_evidence.VARIANTS["constant"][name] for name in ("0.125", "0.5")}
    variants = {"dense": {"": {}}, "constant": constant, "rising": schedule_evidence.VARIANTS["rising"]}
    monkeypatch.setattr(schedule_evidence, "VARIANTS", variants)

    def run(*options: str):
        evidence = ["--json", str(tmp_path / "e.json")]
        sizes = ["--grids", "4x8x8", "--steps", "2", "--held-out", "2", "--device", "cpu"]
        return CliRunner().invoke(script_app(main), ["--model", str(clips_model), *sizes, *evidence, *options])

    first = run("--pairs", "2", "--batch-size", "1", "--plot", str(tmp_path / "e.png"))
    assert first.exit_code == 0, first.output
    assert "64 frames of 2 real clips and no more" in " ".join(first.output.split())
    assert made == [[0]] * 4 + [[1]] * 4
    kept = json.loads((tmp_path / "e.json").read_text())
    assert len(kept["rows"]) == 2 * 4
    assert len(kept["losses"]) == 2 * 2 * 2
    assert run("--pairs", "3", "--batch-size", "1").exit_code == 0
    assert made[8:] == [[2]] * 4
    after = json.loads((tmp_path / "e.json").read_text())
    assert after["rows"][:8] == kept["rows"]
    assert after["losses"] == kept["losses"]
    assert (tmp_path / "e.png").stat().st_size > 10_000
    assert run("--pairs", "4", "--minutes", "0").exit_code == 0
    assert json.loads((tmp_path / "e.json").read_text()) == after
    assert run("--held-out", "3").exit_code == 0
    videos = [row["video"] for row in json.loads((tmp_path / "e.json").read_text())["losses"]]
    assert sorted(videos) == sorted([0, 1, 2] * 4)
    description = clips_model / "clips.json"
    trained = description.read_text()
    description.write_text(trained.replace('"training_steps": ', '"training_steps": 9'))
    assert "give another file" in " ".join(run().output.split())
    description.write_text(trained)
    refused = run("--dense-layers", "0")
    assert refused.exit_code == 2
    assert "give another file, or the same model and settings" in " ".join(refused.output.split())
    for wrong in (("--grids", "4x8"), ("--steps", "2,x"), ("--steps", "0"), ("--batch-size", "0"), ("--pairs", "0")):
        ended = run(*wrong)
        assert ended.exit_code == 2, ended.output
        assert wrong[0] in ended.output


def test_all_tiles_kept_add_nothing_and_few_add_something(clips_model, monkeypatch):
    model = load_evidence_model(clips_model, CPU)
    monkeypatch.setattr(schedule_evidence, "MEANS", (0.125, 1.0 - 1e-12))
    constant = {"0.125": {"top_k_ratio": 0.125}, "1": {"top_k_ratio": 1.0}}
    monkeypatch.setattr(schedule_evidence, "LEVELS", 2)
    monkeypatch.setitem(schedule_evidence.VARIANTS, "constant", constant)
    torch.nn.init.normal_(model.transformer.proj_out.weight)
    evidence = Evidence(None, {})
    schedule_evidence.measure_losses(model, evidence, "4x8x8", 2, 2, ())
    distances = {
        ratio: max(row["distance"] for row in evidence.losses if row["ratio"] == ratio) for ratio in (0.125, 1)
    }
    assert distances[0.125] > 1e-6
    assert distances[1] == 0
    disable_vsa(model.transformer)


def rows_of(family, name, kept, psnrs):
    about = {"grid": "g", "steps": 4, "family": family, "name": name, "kept": kept, "ssim": 1.0, "right": None}
    return [about | {"pair": pair, "psnr": psnr} for pair, psnr in enumerate(psnrs)]


def test_gain_is_over_constant_ratios_of_the_same_pair_at_the_share_kept():
    rows = rows_of("constant", "a", 0.2, (20.0, 30.0)) + rows_of("constant", "b", 0.4, (24.0, 36.0))
    rows += rows_of("front", "c", 0.3, (23.0, 33.5)) + rows_of("front", "d", 0.5, (40.0, 40.0))
    assert [row["gain"] for row in with_gains(rows)] == [None] * 4 + [
        pytest.approx(1.0),
        pytest.approx(0.5),
        None,
        None,
    ]
    found = {row["name"]: row for row in summary(rows)}
    assert found["c"]["gain"] == pytest.approx(0.75)
    assert found["c"]["gain_standard_error"] == pytest.approx(0.25)
    assert found["a"]["psnr"] == pytest.approx(25.0)
    assert "gain" not in found["d"]
    assert "right" not in found["a"]


def test_what_beats_the_front_is_told_at_the_share_kept():
    rows = rows_of("front", "a", 0.2, (20.0, 30.0)) + rows_of("front", "b", 0.4, (24.0, 36.0))
    rows += rows_of("ramp", "c", 0.25, (22.0, 31.0)) + rows_of("ramp", "d", 0.5, (40.0, 40.0))
    found = {row["name"]: row for row in summary(rows)}
    assert (found["c"]["over_front"], found["c"]["over_front_standard_error"]) == (
        pytest.approx(0.25),
        pytest.approx(0.75),
    )
    assert not any("over_front" in found[name] for name in "abd")


def test_added_loss_is_relative_to_the_dense_mean():
    about = {"grid": "g", "share": 0.1, "sigma": 0.9, "distance": 0.0}
    losses = [about | {"ratio": 1.0, "video": video, "loss": loss} for video, loss in enumerate((1.0, 3.0))]
    losses += [about | {"ratio": 0.2, "video": video, "loss": loss} for video, loss in enumerate((1.5, 3.1))]
    dense, sparse = loss_summary(losses)
    assert (dense["added"], dense["loss"]) == (0.0, 2.0)
    assert sparse["added"] == pytest.approx((0.25 + 0.05) / 2)
    assert sparse["added_standard_error"] == pytest.approx(0.1)
