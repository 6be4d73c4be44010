"""The shipped model loads with stock classes and works; its training can be interrupted."""

import copy
import itertools
import json
import random
from pathlib import Path

import imageio.v3 as imageio
import pytest
import torch
from diffusers import WanPipeline
from procedural_video import descriptions, render, sample_scene
from torch import nn
from train_tiny_wan import app
from typer.testing import CliRunner
from vsa_training.muon import Muon, orthogonalise

import tiny_wan_parts
from tiny_wan_evaluation import evaluate_pipeline, generate, held_out_captions
from tiny_wan_parts import TinyWan, build_vae, normalise_latents, save_pipeline
from tiny_wan_settings import Settings
from tiny_wan_training import TrainingRun
from tiny_wan_transformer import (
    Clips,
    Phase,
    SelectedFrames,
    choose_frames,
    encode_clips,
    load_clips,
    train_transformer,
)
from tiny_wan_vae import encode_scenes, reconstruction_psnr, train_vae, with_past, without_past
from vsa_diffusers import disable_vsa, enable_vsa, save_vsa

MODEL = Path(__file__).parents[2] / "examples" / "tiny_wan"
CPU = torch.device("cpu")
SMALL = dict(height=64, width=64, num_frames=9, num_inference_steps=2)


@pytest.fixture(scope="module")
def pipeline():
    pipeline = WanPipeline.from_pretrained(MODEL, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_pipeline_loads_in_fp32_and_has_wan_layout(pipeline):
    assert {part.dtype for part in (pipeline.vae, pipeline.transformer, pipeline.text_encoder)} == {torch.float32}
    assert pipeline.transformer.config.attention_head_dim == 128
    assert tuple(pipeline.transformer.config.patch_size) == (1, 2, 2)
    assert pipeline.vae_scale_factor_spatial == 8
    assert pipeline.vae_scale_factor_temporal == 4


def test_files_are_small_and_hold_no_pickle():
    files = [path for path in MODEL.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 45e6
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".md", ".png"}


def test_nothing_tells_of_the_machine_that_made_it():
    for path in MODEL.rglob("*.json"):
        assert f'"{Path("/").anchor}' not in path.read_text(), path


def test_recommended_settings_ship_with_the_model():
    recommended = json.loads((MODEL / "recommended.json").read_text())
    assert recommended == tiny_wan_parts.RECOMMENDED
    assert recommended["prompt"] in {d.caption for split in ("train", "held_out") for d in descriptions(split)}


@pytest.mark.parametrize("max_sequence_length", [16, 512])
def test_two_steps_give_a_finite_video(pipeline, max_sequence_length):
    settings = {**SMALL, "max_sequence_length": max_sequence_length}
    video = generate(pipeline, "a large red ring moves left over blue waves", 0, **settings)
    assert video.shape == (3, 9, 64, 64)
    assert video.isfinite().all()
    assert video.std() > 0.01


def test_unknown_words_do_not_stop_it(pipeline):
    assert generate(pipeline, "Ein großer Hund 🐕, running!", 0, **SMALL).isfinite().all()


def test_captions_hold_no_unknown_token(pipeline):
    captions = [description.caption for description in held_out_captions(50)]
    ids = pipeline.tokenizer(captions).input_ids
    assert pipeline.tokenizer.unk_token_id not in {token for row in ids for token in row}


@pytest.mark.slow
@torch.no_grad()
def test_a_held_out_clip_is_denoised_by_its_caption(pipeline):
    """One forward on the full grid, mostly noise; without training the error is above 1."""
    scene = sample_scene(0, split="held_out")
    assert scene.caption == "a small pink triangle moves right over purple stripes"
    latents = normalise_latents(pipeline.vae, encode_scenes(pipeline.vae, [scene], 256, 61, CPU))
    noise = torch.randn(latents.shape)

    def error(caption: str) -> float:
        embeds, _ = pipeline.encode_prompt(caption, do_classifier_free_guidance=False, max_sequence_length=32)
        noisy = torch.lerp(latents, noise, 0.9)
        velocity = pipeline.transformer(noisy, torch.tensor([900.0]), embeds, return_dict=False)[0]
        return (velocity - (noise - latents)).square().mean().item()

    right = error(scene.caption)
    assert right < 0.08
    assert error("a large red ring moves left over blue waves") > 2 * right


def test_vae_reconstructs_a_held_out_clip(pipeline):
    assert reconstruction_psnr(pipeline.vae, CPU, clips=1, side=128, frames=17) > 22


def test_vae_is_the_stock_one_with_the_past_left_out(pipeline):
    video = render(sample_scene(0), 32, 32, 9)[None]
    trained = without_past(copy.deepcopy(pipeline.vae))
    with torch.no_grad():
        latents = pipeline.vae.encode(video).latent_dist.mode()
        torch.testing.assert_close(trained.encode(video).latent_dist.mode(), latents, atol=1e-4, rtol=1e-4)
        decoded = pipeline.vae.decode(latents).sample
        torch.testing.assert_close(trained.decode(latents).sample, decoded, atol=1e-4, rtol=1e-4)
    restored = with_past(trained)
    assert all(torch.equal(new, old) for new, old in zip(restored.parameters(), pipeline.vae.parameters(), strict=True))


def test_latents_are_normalised(pipeline):
    assert len(set(pipeline.vae.config.latents_std)) > 1
    assert all(0.1 < std < 10 for std in pipeline.vae.config.latents_std)


def test_training_embeds_captions_as_the_pipeline_does():
    model = TinyWan().eval()
    pipe = WanPipeline(model.tokenizer, model.text_encoder, build_vae(), None, model.transformer)
    captions = ["a small blue disc moves up over grey dots", ""]
    with torch.no_grad():
        expected = pipe.encode_prompt(captions, do_classifier_free_guidance=False, max_sequence_length=40)[0]
        torch.testing.assert_close(model.embed(captions, 40), expected, atol=1e-5, rtol=1e-5)


def test_selected_frames_keep_their_places_in_time():
    rope = TinyWan().transformer.rope
    selected = SelectedFrames(rope)
    selected.frames = [1, 4, 7]
    whole = rope(torch.zeros(1, 16, 8, 4, 6))
    picked = selected(torch.zeros(1, 16, 3, 4, 6))
    for all_angles, angles in zip(whole, picked, strict=True):
        torch.testing.assert_close(angles, all_angles.view(1, 8, 6, 1, 128)[:, [1, 4, 7]].flatten(1, 2))


def test_chosen_frames_are_in_range_and_even():
    for seed in range(50):
        frames = choose_frames(random.Random(seed), 16, 4)
        assert 0 <= frames[0] < frames[-1] < 16
        assert len({later - earlier for earlier, later in itertools.pairwise(frames)}) == 1


def test_muon_updates_are_orthogonal_and_lower_the_loss():
    torch.manual_seed(0)
    singular_values = torch.linalg.svdvals(orthogonalise(torch.randn(3, 16, 40)))
    assert singular_values.min() > 0.5
    assert singular_values.max() < 1.5
    layer, target = nn.Linear(8, 8, bias=False), torch.randn(8, 8)
    optimizer = Muon(layer.parameters(), lr=0.05)
    losses = []
    for _ in range(60):
        loss = (layer.weight - target).square().mean()
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        layer.zero_grad()
    assert losses[-1] < 0.5 * losses[0]


def test_a_run_goes_on_where_it_stopped(tmp_path):
    def advance(run: TrainingRun, steps: int) -> torch.Tensor:
        for _ in range(steps):
            inputs = torch.randn(4, 6, generator=torch.Generator().manual_seed(run.step))
            run.module(inputs).square().mean().backward()
            run.update()
        return run.module[0].weight.detach().clone()

    def fresh(folder: Path) -> TrainingRun:
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 3))
        return TrainingRun(folder, module, lr=1e-2, minutes=1e6)

    straight = advance(fresh(tmp_path / "straight"), 8)
    first_half = fresh(tmp_path / "halves")
    advance(first_half, 4)
    first_half.save()
    second_half = fresh(tmp_path / "halves")
    assert second_half.step == 4
    torch.testing.assert_close(advance(second_half, 4), straight)


def test_every_stage_runs_end_to_end(tmp_path):
    """A few seconds of each stage: what comes out is noise, but it is a pipeline."""
    vae_options = dict(batch_size=1, crop=32, frames=5, lr=1e-3, measured_clips=1)
    assert train_vae(tmp_path / "vae", CPU, minutes=1.0, call_minutes=0.0, **vae_options) is None
    vae = train_vae(tmp_path / "vae", CPU, minutes=0.02, call_minutes=None, **vae_options)
    clips = Clips(side=32, frames=9, count=32)
    encode_clips(tmp_path / "latents", vae, clips, CPU)
    latents, captions = load_clips(tmp_path / "latents", clips, CPU)
    assert latents.shape == (32, 16, 3, 4, 4)
    assert captions[5] == clips.scene(5).caption
    phases = [
        Phase(until=0.5, clips=clips, batch_size=2, shift=1.0, latent_frames=2),
        Phase(until=1.0, clips=clips, batch_size=2, shift=3.0),
    ]
    options = dict(minutes=0.03, call_minutes=None, lr=1e-3)
    model = train_transformer(tmp_path / "transformer", tmp_path / "latents", phases, CPU, **options)
    save_pipeline(tmp_path / "model", vae, model)
    sizes = dict(captions=1, vae_clips=1, detector_clips=1, side=32, frames=9, steps=1)
    result = evaluate_pipeline(tmp_path / "model", CPU, **sizes)
    assert set(result["generated"]["right"]) == {"shape", "colour", "direction", "all"}
    assert "vsa" not in result


def evaluate(folder: Path, *options: str):
    """`evaluate` of one caption at the smallest size that has two tiles, without the parts that VSA does not touch."""
    small = dict(device="cpu", captions=1, side=64, frames=29, steps=2) | {"vae-clips": 0, "detector-clips": 0}
    arguments = [f"--{name}={value}" for name, value in small.items()]
    return CliRunner().invoke(app, ["evaluate", "--model", str(folder), *arguments, *options])


def test_with_vsa_the_sparse_pipeline_is_judged(pipeline, tmp_path):
    save_vsa(enable_vsa(pipeline.transformer, 0.5), tmp_path / "unchanged")
    tuned = copy.deepcopy(disable_vsa(pipeline.transformer))
    with torch.no_grad():
        tuned.proj_out.weight.mul_(0.9)
    save_vsa(enable_vsa(tuned, 0.5), tmp_path / "tuned")

    def judged(name: str, *options: str) -> tuple[dict, bytes]:
        output, sheet = tmp_path / f"{name}.json", tmp_path / f"{name}.png"
        run = evaluate(MODEL, *options, "--output", str(output), "--sheet", str(sheet))
        assert run.exit_code == 0, run.output
        return json.loads(output.read_text()), imageio.imread(sheet).tobytes()

    dense, dense_frames = judged("dense")
    free, free_frames = judged("free", "--top-k-ratio", "0.5")
    _, early_dense_frames = judged("early_dense", "--top-k-ratio", "0.5", "--dense-steps", "0.5")
    saved, saved_frames = judged("saved", "--vsa", str(tmp_path / "unchanged"))
    _, tuned_frames = judged("fine_tuned", "--vsa", str(tmp_path / "tuned"))
    whole, whole_frames = judged("whole", "--vsa", str(tmp_path / "unchanged"), "--dense-steps", "1")

    assert len({dense_frames, free_frames, early_dense_frames, tuned_frames}) == 4
    assert saved_frames == free_frames
    assert whole_frames == dense_frames
    assert set(dense) == {"generated", "device", "verdicts"}
    assert (free["vsa"]["top_k_ratio"], free["vsa"]["fine_tuned"]) == (0.5, False)
    assert (saved["vsa"]["top_k_ratio"], saved["vsa"]["fine_tuned"]) == (0.5, True)
    assert whole["vsa"]["dense_steps"] == 1.0


@pytest.mark.parametrize(
    ("options", "replaced"),
    [
        (["--top-k-ratio", "0.5"], False),
        (["--top-k-ratio", "0.5", "--vae-clips", "1", "--detector-clips", "1"], False),
        ([], False),
        (["--vae-clips", "1", "--detector-clips", "1"], True),
    ],
)
def test_only_a_whole_dense_evaluation_replaces_the_one_beside_the_model(options, replaced, tmp_path):
    for part in MODEL.iterdir():
        if part.name != "evaluation.json":
            (tmp_path / part.name).symlink_to(part)
    (tmp_path / "evaluation.json").write_text("before")
    run = evaluate(tmp_path, *options)
    assert run.exit_code == 0, run.output
    assert ((tmp_path / "evaluation.json").read_text() != "before") == replaced
    assert ("Written to no file" in run.output) != replaced


def test_settings_of_vsa_are_refused_where_there_is_none(tmp_path):
    run = evaluate(MODEL, "--selection", "quarters", "--output", str(tmp_path / "out.json"))
    assert run.exit_code == 2
    assert "needs VSA" in run.output
    assert not (tmp_path / "out.json").exists()


def test_a_stage_that_is_out_of_time_says_so_by_its_exit_status(tmp_path):
    result = CliRunner().invoke(app, ["vae", "--runs", str(tmp_path), "--device", "cpu", "--call-minutes", "0"])
    assert result.exit_code == 75
    assert (tmp_path / "vae" / "state.safetensors").exists()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_settings_end_with_the_full_grid(device):
    settings = Settings.for_device(device)
    last = settings.phases[-1]
    assert last.until == 1.0
    assert (last.clips.side, last.clips.frames, last.latent_frames) == (256, 61, None)
    assert [phase.until for phase in settings.phases] == sorted(phase.until for phase in settings.phases)


def test_training_scenes_are_never_held_out():
    held_out = {description.caption for description in held_out_captions(50)}
    assert not held_out & {Clips(64, 29, 0).scene(index).caption for index in range(300)}
    assert sample_scene(0, split="held_out").caption not in {d.caption for d in descriptions("train")}
