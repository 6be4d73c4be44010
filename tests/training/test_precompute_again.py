"""`precompute_latents.py` run again: the same run goes on, and nothing is mixed with what was made otherwise."""

import json
import sys
import types

import precompute_latents
import pytest
import torch
from vsa_training.command_line import run_script
from vsa_training.conventions import SizeUnits
from vsa_training.dataset import Shards, check_shard, split_shards
from vsa_training.description import Description
from vsa_training.identity import module_digest

from tiny_text_pipeline import tiny_pipeline
from training_material import precompute, precompute_options, write_videos

ONE_EACH = dict(samples_per_shard=1)
BY_FACTORS = dict(vae_scale_factor_spatial=8, vae_scale_factor_temporal=4)
BY_RATIOS = dict(vae_spatial_compression_ratio=32, vae_temporal_compression_ratio=8)


@pytest.fixture(scope="module")
def pipe():
    torch.manual_seed(0)
    return tiny_pipeline()


@pytest.fixture(scope="module")
def made(pipe, tmp_path_factory):
    """Two videos, and a shard of each; tests that change something put it back."""
    folder = tmp_path_factory.mktemp("again")
    write_videos(folder / "videos", 2)
    precompute(pipe, folder, **ONE_EACH)
    return folder


def states(folder):
    return {path.name: path.stat().st_mtime_ns for path in (folder / "latents").glob("*.safetensors")}


def test_the_same_run_makes_only_what_is_missing(made, pipe):
    whole, before = content(made), states(made)
    (made / "latents" / "000001.safetensors").unlink()
    precompute(pipe, made, **ONE_EACH)
    assert states(made)["000000.safetensors"] == before["000000.safetensors"]
    assert states(made)["000001.safetensors"] != before["000001.safetensors"]
    assert content(made) == whole


def content(folder):
    return Shards(split_shards(folder / "latents", 0)[0]).digest(), Description.load(folder / "latents")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(height=80), r"height=64 \(now 80\)"),
        (dict(width=64, num_frames=13), r"num_frames=17 \(now 13\), width=96 \(now 64\)"),
        (dict(fps=15), r"fps=16 \(now 15\)"),
        (dict(pipeline_arguments='{"max_sequence_length": 16}'), r"call={'max_sequence_length': 32} \(now "),
        (dict(seed=1), r"seed=0 \(now 1\)"),
        (dict(dtype="bf16"), r"dtype=fp32 \(now bf16\)"),
    ],
)
def test_other_options_are_refused_by_name(made, pipe, changes, message):
    before = states(made)
    with pytest.raises(ValueError, match=rf"holds shards made with {message}.*; go on with those, or choose another"):
        precompute(pipe, made, **ONE_EACH, **changes)
    assert states(made) == before


@pytest.mark.parametrize("part", ["vae", "text_encoder", "transformer"])
def test_another_model_is_refused_by_name(made, part):
    torch.manual_seed(0)
    other = tiny_pipeline()
    if part == "transformer":
        other.transformer.register_to_config(rope_max_seq_len=512)
    else:
        next(getattr(other, part).parameters()).data.add_(1e-3)
    with pytest.raises(ValueError, match=rf"holds shards made with {part}=\w+ \(now \w+\); go on with those"):
        precompute(other, made, **ONE_EACH)


def test_the_same_model_is_the_same_wherever_it_was_loaded_from(pipe, tmp_path):
    pipe.vae.save_pretrained(tmp_path)
    assert module_digest(type(pipe.vae).from_pretrained(tmp_path)) == module_digest(pipe.vae)


@pytest.mark.parametrize("damage", [b"", b"half", b"foreign"])
def test_a_damaged_shard_is_refused_by_name_before_any_work(made, pipe, damage, monkeypatch):
    monkeypatch.setattr(precompute_latents, "sample_of", None)
    path = made / "latents" / "000001.safetensors"
    whole = path.read_bytes()
    path.write_bytes({b"half": whole[: len(whole) // 2], b"foreign": b"x" * 200}.get(damage, damage))
    try:
        with pytest.raises(ValueError, match=r"000001.safetensors is damaged or no shard .*; remove it, and run"):
            precompute(pipe, made, **ONE_EACH)
    finally:
        path.write_bytes(whole)


def test_other_clips_are_refused_by_the_shards_name(made, pipe):
    caption = made / "videos" / "1.txt"
    before = caption.read_text()
    caption.write_text("something else")
    try:
        with pytest.raises(ValueError, match=r"000001.safetensors holds other captions of its clips than data_dir"):
            precompute(pipe, made, **ONE_EACH)
    finally:
        caption.write_text(before)
    with pytest.raises(ValueError, match=r"000001.safetensors holds clips that data_dir does not have now; remove it"):
        precompute(pipe, made, count=1, **ONE_EACH)
    with pytest.raises(ValueError, match=r"000000.safetensors holds"):
        check_shard(made / "latents" / "000000.safetensors", ["0.mp4#0", "1.mp4#0"], ["", ""])


def test_shards_of_unknown_origin_are_left_alone(made, pipe, tmp_path):
    (tmp_path / "000000.safetensors").write_bytes((made / "latents" / "000000.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"has shards but no dataset.json; choose another output_dir"):
        precompute(pipe, made, count=1, output_dir=str(tmp_path), **ONE_EACH)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not readable as JSON"),
        ("[]", "holds a JSON list"),
        ('{"format": 7}', "has format 7, not 1"),
        ('{"format": 1, "pipeline": "WanPipeline"}', "has transformer, channel_axis, shift, height, width"),
    ],
)
def test_a_description_that_is_none_is_refused(tmp_path, content, message):
    (tmp_path / "dataset.json").write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        Description.load(tmp_path)
    assert str(tmp_path / "dataset.json") in str(error.value)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (dict(height=100), "height=100 (nearest: 96 or 112) does not fit WanPipeline"),
        (dict(height=8), "height=8 (nearest: 16) does not fit"),
        (dict(width=97, num_frames=16), "width=97 (nearest: 96 or 112) and num_frames=16 (nearest: 13 or 17) does not"),
        (dict(num_frames=2), "num_frames=2 (nearest: 1 or 5) does not fit"),
        (dict(num_frames=80, height=90), "multiples of 16 x 16 pixels and 4k + 1 frames."),
    ],
)
def test_sizes_that_the_model_cannot_take_are_refused_before_any_work(made, pipe, monkeypatch, sizes, message):
    monkeypatch.setattr(precompute_latents, "sample_of", None)
    with pytest.raises(ValueError) as error:
        precompute_latents.precompute(pipe, [], precompute_options(made, **sizes))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("config", "names", "units"),
    [
        (dict(patch_size=(1, 2, 2)), BY_FACTORS, (16, 16, 4)),
        (dict(patch_size=2, patch_size_t=2), BY_FACTORS, (16, 16, 8)),
        (dict(patch_size=1, patch_size_t=1), BY_RATIOS, (32, 32, 8)),
        (dict(patch_size=2, patch_size_t=None), dict(vae_scale_factor=8), (16, 16, 1)),
    ],
)
def test_units_come_from_the_vae_and_the_patches(monkeypatch, config, names, units):
    transformer = types.SimpleNamespace(config=config)
    monkeypatch.setattr("vsa_training.conventions.supported_parts", lambda pipe: {"transformer": transformer})
    found = SizeUnits.of(types.SimpleNamespace(**names))
    assert (found.height, found.width, found.frames) == units


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--height=0"], "height=0 must be at least 1."),
        (["--fps=nan"], "fps=nan must be a positive number."),
        (["--caption_dropout=2"], "caption_dropout=2.0 must be in 0 to 1."),
        (["--pipeline_arguments={"], "pipeline_arguments='{' is not JSON"),
        (["--pipeline_arguments=3"], "pipeline_arguments='3' must be an object, in braces."),
        (["--data_dir=nowhere"], "data_dir=nowhere: no such directory"),
        (["--height=100"], "height=100 (nearest: 96 or 112) does not fit WanPipeline"),
    ],
)
def test_wrong_options_end_with_one_sentence_and_status_2(made, pipe, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.setattr(precompute_latents.diffusers.DiffusionPipeline, "from_pretrained", lambda *_, **__: pipe)
    monkeypatch.setattr(precompute_latents, "check_pretrained", lambda name: None)
    given = ["--pretrained_model_name_or_path=pipe", f"--data_dir={made / 'videos'}", "--num_frames=17"]
    monkeypatch.setattr(sys, "argv", ["precompute_latents.py", *given, f"--output_dir={tmp_path / 'latents'}", *words])
    with pytest.raises(SystemExit) as ended:
        run_script(precompute_latents.Options, precompute_latents.main, "")
    told = capsys.readouterr().err
    assert ended.value.code == 2
    assert told.startswith("error: ")
    assert message in told
    assert told.count("\n") == 1
    assert not (tmp_path / "latents").exists()


def test_captions_that_cannot_be_read_are_told(made, tmp_path):
    for line, message in (
        ("{", "line 2 is not JSON"),
        ("[1]", 'line 2 has no "file_name"'),
        (json.dumps({"file_name": "a.mp4", "text": 3}), "has no text or caption or prompt for a.mp4"),
    ):
        (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "b.mp4", "text": "x"}) + "\n" + line)
        with pytest.raises(ValueError, match=message):
            precompute_latents.find_clips(tmp_path, 5, 16, 1)
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "b.mp4", "text": "x"}))
    (tmp_path / "b.mp4").write_bytes(b"no video")
    with pytest.raises(ValueError, match=r"b.mp4 cannot be read as a video"):
        precompute_latents.find_clips(tmp_path, 5, 16, 1)
