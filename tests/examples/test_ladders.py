"""The samplers of few-step students: their formulas and levels, on stock pipelines, from published layouts."""

import diffusers
import fastwan
import pytest
import torch
from published_checkpoints import CONTRACT, write_fasth3, write_wan
from safetensors.torch import load_file, save_file
from video_scripts.ladders import FASTH3, DMDScheduler, ladder_schedulers, shifted

from oracle import relative_error
from tiny_pipelines_joint import transformer
from tiny_text_pipeline import tiny_pipeline
from vsa_diffusers import load_vsa
from vsa_diffusers.cli.script import run_script
from vsa_diffusers.pipeline import enabled_config
from vsa_diffusers.video_files import read_frames

SIZE = dict(height=64, width=64, num_frames=9, guidance_scale=1.0, output_type="latent")


def predictions(model):
    """What the transformer was given and answered, call by call."""
    seen = []

    def keep(module, args, kwargs, output):
        seen.append((kwargs["timestep"], kwargs["hidden_states"].clone(), output[0].clone()))

    model.register_forward_hook(keep, with_kwargs=True)
    return seen


def test_three_steps_of_fastwan_are_its_formula(tmp_path):
    write_wan(tmp_path)
    pipe = tiny_pipeline()
    pipe.set_progress_bar_config(disable=True)
    load_vsa(pipe, tmp_path, top_k_ratio=0.2)
    pipe.scheduler = DMDScheduler(seed=7)
    seen = predictions(pipe.transformer)
    output = pipe("a cat", **SIZE, num_inference_steps=3, generator=torch.Generator().manual_seed(0)).frames
    assert [round(float(t[0])) for t, _, _ in seen] == [1000, 757, 522]
    noise = torch.Generator().manual_seed(7)
    x = seen[0][1]
    for (_, given, velocity), sigma, following in zip(seen, (1.0, 0.757, 0.522), (0.757, 0.522, 0.0), strict=True):
        torch.testing.assert_close(given, x, atol=1e-5, rtol=1e-5)
        clean = x - sigma * velocity
        x = (1 - following) * clean + following * torch.randn(x.shape, generator=noise)
    assert relative_error(output, x) < 1e-6


def test_another_number_of_steps_is_refused():
    with pytest.raises(ValueError, match="num_inference_steps=50, but the model was trained for 3 steps"):
        DMDScheduler().set_timesteps(50)
    with pytest.raises(ValueError, match="forwards=6: students of FastH3 have 4 or 8"):
        ladder_schedulers(6)


@pytest.mark.parametrize(("forwards", "stock", "video", "audio"), [(4, 5, 1.5e-4, 4.9e-4), (8, 9, 2.4e-4, 6e-4)])
def test_the_ladders_of_fasth3_are_those_of_training_and_near_the_stock_ones(forwards, stock, video, audio):
    schedulers = ladder_schedulers(forwards)
    positions, *shifts = FASTH3[forwards]
    for name, shift, nearness in zip(schedulers, shifts, (video, audio), strict=True):
        schedulers[name].set_timesteps(stock)
        torch.testing.assert_close(schedulers[name].sigmas, torch.tensor(shifted(positions, shift)))
        plain = diffusers.MiniMaxH3Scheduler(shift=shift)
        plain.set_timesteps(stock)
        assert 0 < float((schedulers[name].sigmas - plain.sigmas).abs().max()) < nearness
    with pytest.raises(ValueError, match=f"num_inference_steps=50, but {forwards} forwards make {stock}"):
        schedulers["scheduler"].set_timesteps(50)


def test_the_published_levels_come_out():
    levels = [0.999900, 0.985788, 0.967575, 0.943168, 0.909091, 0.857143, 0.769231, 0.588235, 0]
    assert shifted(FASTH3[8][0], 10.0) == pytest.approx(levels, abs=6e-7)
    assert shifted((1, 0.75, 0.5, 0.25, 0), 12.0) == pytest.approx([1, 0.972973, 0.923077, 0.8, 0], abs=6e-7)


def test_eight_forwards_of_fasth3_walk_the_ladder(tmp_path):
    module = pytest.importorskip(
        "diffusers.modular_pipelines.minimax_h3.modular_blocks_minimax_h3",
        reason="runs with a diffusers that has MiniMax-H3's blocks; constraints.txt names one",
    )
    pipe = module.MiniMaxH3CoreDenoiseStep().init_pipeline()
    model = transformer("minimax-h3", in_channels=24, audio_in_channels=32)
    pipe.update_components(transformer=model, **ladder_schedulers(8))
    pipe.set_progress_bar_config(disable=True)
    write_fasth3(tmp_path, CONTRACT)
    gates = {key: value for key, value in gates_of(tmp_path).items() if "to_gate_compress" in key}
    save_file(gates, tmp_path / "gates.safetensors")
    load_vsa(model, tmp_path / "gates.safetensors")
    assert enabled_config(model).top_k_ratio == 0.2
    seen = predictions(model)
    made = pipe(
        prompt_embeds=torch.ones(1, 7, 16), text_token_tags=torch.ones(7, dtype=torch.long), height=128, width=128,
        num_frames=124, num_inference_steps=9, generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    levels = shifted(FASTH3[8][0], 10.0)
    assert len(seen) == 8
    for (timestep, _, _), level in zip(seen, levels, strict=False):
        assert float((timestep - (1 - level)).abs().min()) < 1e-6
    x = seen[0][1]
    for (_, given, velocity), level, following in zip(seen, levels[:-1], levels[1:], strict=True):
        torch.testing.assert_close(given, x, atol=1e-4, rtol=1e-4)
        ratio = following / level
        x = ratio * x + (1 - ratio) * (x + level * velocity)
    assert torch.isfinite(made.get("latents")).all()


def gates_of(folder):
    return load_file(sorted((folder / "transformer").glob("*.safetensors"))[-1])


def test_the_script_makes_a_video_from_a_published_layout(tmp_path):
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path / "wan")
    write_wan(tmp_path / "FastWan2.1-T2V-1.3B-Diffusers", "mixed", index=False)
    words = [
        "--model", tmp_path / "wan", "--checkpoint", tmp_path / "FastWan2.1-T2V-1.3B-Diffusers", "--device=cpu",
        "--dtype=float32", "--height=64", "--width=64", "--num-frames=9", "--output", tmp_path / "new" / "a.mp4",
    ]  # fmt: skip
    with pytest.raises(SystemExit) as ended:
        run_script(fastwan.main, [str(word) for word in words])
    assert ended.value.code == 0
    assert read_frames(tmp_path / "new" / "a.mp4").shape[0] == 9
