"""The scripts for real models, each on a tiny random pipeline of its kind, as a user calls it."""

import subprocess

import hunyuan_vsa
import ltx2_vsa
import numpy as np
import pytest
import torch
import wan22_two_experts
import wan_vsa
from imageio_ffmpeg import get_ffmpeg_exe
from video_scripts import making

from tiny_ltx2_files import save_single_file, tiny_ltx2
from tiny_text_pipeline import tiny_hunyuan_video, tiny_pipeline
from vsa_diffusers.cli.script import run_script
from vsa_diffusers.pipeline import enabled_config
from vsa_diffusers.video_files import read_frames

SMALL = ["--device=cpu", "--dtype=float32", "--num-inference-steps=2"]
LTX2 = [*SMALL, "--height=32", "--width=32", "--num-frames=5", "--num-inference-steps=1"]
WAN = [*SMALL, "--height=128", "--width=128", "--num-frames=9", "--dense-steps=0"]


def run(script, *words):
    """0, or what the process would end with."""
    with pytest.raises(SystemExit) as ended:
        run_script(script.main, [str(word) for word in words])
    return ended.value.code


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of tiny pipelines by name, and LTX-2 as a single file."""
    folder = tmp_path_factory.mktemp("models")
    ltx2 = tiny_ltx2()
    save_single_file(ltx2, folder / "ltx2.safetensors")
    save_single_file(ltx2, folder / "vocoder.safetensors", ["vocoder"])
    save_single_file(tiny_ltx2(num_layers=3), folder / "other.safetensors")
    ltx2.save_pretrained(folder / "ltx2")
    ltx2.tokenizer.save_pretrained(folder / "gemma")
    ltx2.text_encoder.save_pretrained(folder / "gemma")
    tiny_pipeline().save_pretrained(folder / "wan")
    tiny_pipeline(experts=2).save_pretrained(folder / "wan22")
    tiny_hunyuan_video().save_pretrained(folder / "hunyuan")
    return folder


@pytest.fixture(scope="module")
def ltx2_video(models, tmp_path_factory):
    """The folder of a sparse video and the dense one, from a pipeline's folder."""
    folder = tmp_path_factory.mktemp("videos")
    words = [*LTX2, "--checkpoint", models / "ltx2", "--top_k_ratio=0.1", "--compare", "--output", folder / "new/a.mp4"]
    assert run(ltx2_vsa, *words) == 0
    return folder / "new"


@pytest.fixture
def made(monkeypatch):
    """The pipelines that were called."""
    pipes, make = [], making.make_videos

    def keep(pipe, *arguments, **options):
        pipes.append(pipe)
        make(pipe, *arguments, **options)

    monkeypatch.setattr(making, "make_videos", keep)
    return pipes


def sound_of(path):
    """Samples of a file's sound, both channels."""
    command = [get_ffmpeg_exe(), "-i", path, "-f", "s16le", "-"]
    return np.frombuffer(subprocess.run(command, capture_output=True, check=True).stdout, np.int16).reshape(-1, 2)


def same_video(one, other):
    return np.array_equal(read_frames(one), read_frames(other)) and np.array_equal(sound_of(one), sound_of(other))


def test_ltx2_makes_a_sparse_and_a_dense_video_with_sound(ltx2_video):
    sparse, dense = (read_frames(ltx2_video / name) for name in ("a.mp4", "a_dense.mp4"))
    assert sparse.shape == dense.shape == (5, 32, 32, 3)
    assert not np.array_equal(sparse, dense)
    assert 0.15 < len(sound_of(ltx2_video / "a.mp4")) / 24000 < 0.25  # 5 frames at 25 per second, and what AAC adds


@pytest.mark.parametrize(("more", "same"), [(["--top-k-ratio=0.1"], "a.mp4"), (["--no-vsa"], "a_dense.mp4")])
def test_ltx2_from_a_single_file_makes_the_same_videos(models, ltx2_video, tmp_path, more, same):
    source = ["--checkpoint", models / "ltx2.safetensors", "--text-encoder-path", models / "gemma"]
    words = [*LTX2, *source, "--config", models / "ltx2", "--output", tmp_path / "b.mp4"]
    assert run(ltx2_vsa, *words, *more) == 0
    assert same_video(tmp_path / "b.mp4", ltx2_video / same)


def test_ltx2_takes_the_options_of_the_original_example(models, made, tmp_path):
    words = ["--batch_size=2", "--block_size", *"124", "--video-shape", 3, 16, 16, "--skip-audio", "--offload=none"]
    assert run(ltx2_vsa, *LTX2, "--checkpoint", models / "ltx2", "--output", tmp_path / "c.mp4", *words) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c_0.mp4", "c_1.mp4"]
    assert not np.array_equal(read_frames(tmp_path / "c_0.mp4"), read_frames(tmp_path / "c_1.mp4"))
    with pytest.raises(subprocess.CalledProcessError):
        sound_of(tmp_path / "c_0.mp4")
    config = enabled_config(made[0].transformer)
    assert (config.top_k_ratio, config.block_size, config.video_shape) == (0.5, (1, 2, 4), (3, 16, 16))


@pytest.mark.parametrize(
    ("checkpoint", "words", "message"),
    [
        ("nowhere.safetensors", [], "nowhere.safetensors': no such file"),
        ("ltx2", ["--text-encoder-path=./nowhere"], "text_encoder_path='./nowhere': no such directory"),
        ("wan", [], "is a WanPipeline; this script is for LTX-2"),
        ("vocoder.safetensors", [], "holds no transformer"),
        ("other.safetensors", [], "does not fit the transformer of config="),
        ("ltx2", ["--no-vsa", "--compare"], "leave one out"),
        ("ltx2", ["--video-shape", 9, 9, 10], "video_shape=(9, 9, 10) has 810 tokens, but the transformer's inputs"),
    ],
)  # fmt: skip
def test_ltx2_says_what_is_wrong_with_what_it_was_given(models, tmp_path, capsys, checkpoint, words, message):
    words = [*LTX2, "--checkpoint", models / checkpoint, "--config", models / "ltx2", *words]
    assert run(ltx2_vsa, *words, "--output", tmp_path / "d.mp4") == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not any(tmp_path.iterdir())


def test_wan_compares_dense_and_sparse_with_compiled_blocks(models, made, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(
        making, "compile_blocks", lambda pipe: pipe.transformer.compile_repeated_blocks(backend="eager", fullgraph=True)
    )
    words = [*WAN, "--model", models / "wan", "--ratio=0.05", "--compare", "--compile", "--output", tmp_path / "e.mp4"]
    assert run(wan_vsa, *words) == 0
    sparse, dense = (read_frames(tmp_path / name) for name in ("e.mp4", "e_dense.mp4"))
    assert sparse.shape == dense.shape == (9, 128, 128, 3)
    assert not np.array_equal(sparse, dense)
    assert made[0].scheduler.config.flow_shift == 3.0
    config = enabled_config(made[0].transformer)
    assert (config.top_k_ratio, config.block_size, config.dense_layers) == (0.05, None, (0,))
    told = capsys.readouterr().out
    assert "times dense" in told
    assert f"VSA: {tmp_path / 'e.mp4'}, 9 frames in " in told


def test_each_expert_of_wan22_keeps_its_own_share(models, made, tmp_path):
    words = [*WAN, "--model", models / "wan22", "--low-noise-ratio=0.2", "--output", tmp_path / "f.mp4"]
    assert run(wan22_two_experts, *words) == 0
    first, second = made[0].transformer, made[0].transformer_2
    assert (enabled_config(first).top_k_ratio, enabled_config(second).top_k_ratio) == (0.4, 0.2)
    assert len(read_frames(tmp_path / "f.mp4")) == 9
    assert run(wan22_two_experts, *WAN, "--model", models / "wan", "--output", tmp_path / "g.mp4") == 2


def test_hunyuan_makes_a_video(models, made, tmp_path):
    words = [*SMALL, "--height=64", "--width=64", "--num-frames=9", "--model", models / "hunyuan"]
    assert run(hunyuan_vsa, *words, "--output", tmp_path / "h.mp4") == 0
    assert len(read_frames(tmp_path / "h.mp4")) == 9
    assert enabled_config(made[0].transformer).dense_steps == 0.2


def test_without_a_gpu_the_default_device_is_refused_before_anything_is_loaded(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for script in (hunyuan_vsa, wan22_two_experts, wan_vsa):
        assert run(script, "--model=./nowhere", "--output", tmp_path / "i.mp4") == 2
        assert "device='cuda': PyTorch sees no GPU; add --device cpu" in capsys.readouterr().err


def test_a_video_that_the_gpu_does_not_hold_is_told_with_the_mend(monkeypatch, models, tmp_path, capsys):
    def fail(*arguments, **options):
        raise torch.OutOfMemoryError("tried to allocate 80 GiB")

    monkeypatch.setattr(making, "run_pipeline", fail)
    assert run(wan_vsa, *WAN, "--model", models / "wan", "--output", tmp_path / "j.mp4") == 2
    assert "add --offload model, or make fewer frames" in capsys.readouterr().err
