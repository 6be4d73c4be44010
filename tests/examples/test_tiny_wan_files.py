"""What the tiny model's scripts write is whole, and what they read is what they wrote."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner
from vsa_evidence import app

from tiny_wan_parts import build_vae
from tiny_wan_training import TrainingRun
from tiny_wan_transformer import SHARD, Clips, encode_clips

CPU = torch.device("cpu")


def training_run(folder, width=6) -> TrainingRun:
    torch.manual_seed(0)
    return TrainingRun(folder, nn.Sequential(nn.Linear(6, width), nn.LayerNorm(width)), lr=1e-2, minutes=1e6)


@pytest.fixture
def saved(tmp_path):
    run = training_run(tmp_path)
    run.module(torch.randn(4, 6)).square().mean().backward()
    run.update()
    run.save()
    return tmp_path


def test_a_save_is_one_file_so_that_weights_never_meet_another_saves_step(saved):
    assert [path.name for path in saved.iterdir()] == ["state.safetensors"]
    assert training_run(saved).step == 1


def test_a_state_that_is_damaged_or_another_models_is_refused_by_name(saved):
    path = saved / "state.safetensors"
    with pytest.raises(ValueError, match=r"state.safetensors does not fit this training: 8 other sizes"):
        training_run(saved, width=8)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"state.safetensors is not a whole safetensors file"):
        training_run(saved)
    path.write_bytes(whole)
    tensors = load_file(path)
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"state.safetensors does not say how far it is"):
        training_run(saved)
    del tensors["average.0.weight"]
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"1 missing keys: \['average.0.weight'\]"):
        training_run(saved)


def test_latents_of_another_vae_are_not_taken_for_this_ones(tmp_path):
    torch.manual_seed(0)
    vae, clips = build_vae().eval(), Clips(side=16, frames=5, count=SHARD)
    encode_clips(tmp_path, vae, clips, CPU)
    [shard] = (tmp_path / clips.name).iterdir()
    before = shard.read_bytes()
    encode_clips(tmp_path, vae, clips, CPU)
    torch.manual_seed(1)
    with pytest.raises(ValueError, match=r"000000.safetensors was made with another VAE; remove it, or choose another"):
        encode_clips(tmp_path, build_vae().eval(), clips, CPU)
    assert shard.read_bytes() == before
    shard.write_bytes(before[:-100])
    with pytest.raises(ValueError, match=r"000000.safetensors is not a whole safetensors file"):
        encode_clips(tmp_path, vae, clips, CPU)


@pytest.mark.parametrize("content", ['{"settings": {', "[]", json.dumps({"runs": {}})])
def test_results_that_are_none_are_refused_by_name(tmp_path, content):
    (tmp_path / "results.json").write_text(content)
    run = CliRunner().invoke(app, [f"--output={tmp_path}", "--report-only"])
    assert run.exit_code == 2
    # The message stands in a frame, whose width depends on the terminal, and the path's length on the machine.
    assert "results.json" in "".join(character for character in run.output if character not in "│\n ")
    assert (tmp_path / "results.json").read_text() == content
