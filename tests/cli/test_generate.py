"""`vsa-diffusers generate`, and what it is made of."""

import json
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.ltx2 import LTX2Vocoder
from peft import get_peft_model_state_dict
from PIL import Image

from tiny_fine_tuned import fine_tuned
from tiny_pipelines_video import TINY, ltx2, ltx2_embeddings
from vsa_diffusers import VSAConfig, save_gates, save_vsa
from vsa_diffusers.cli import app, options, script
from vsa_diffusers.generation import generate as generation
from vsa_diffusers.generation.calling import call_arguments, call_pipeline, frames_per_second, named_arguments
from vsa_diffusers.generation.loading import place
from vsa_diffusers.generation.sparsity import check_sparse, read_config, read_fields
from vsa_diffusers.schedule import RatioSchedule
from vsa_diffusers.video_files import read_frames

MODEL = str(Path(__file__).parents[2] / "examples" / "tiny_wan")
CALL = dict(prompt="a red circle", height=64, width=64, num_frames=9, num_inference_steps=2)
SPARSE = dict(top_k_ratio=0.25, block_size=(2, 2, 2))


def run(capsys, *argv):
    with pytest.raises(SystemExit) as ended:
        app.main(["generate", MODEL, "a red circle", *argv])
    return ended.value.code, capsys.readouterr()


def frames(tmp_path, **options):
    made = generation.generate(MODEL, tmp_path / "video.mp4", CALL, **options)
    assert made.path.exists()
    return made.video.frames


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    return frames(tmp_path_factory.mktemp("sparse"), changes=SPARSE)


def test_it_writes_a_video_and_tells_of_it(capsys, tmp_path, sparse):
    output = tmp_path / "new" / "video.mp4"
    code, printed = run(
        capsys, "--height=64", "--width", "64", "--frames=9", "--steps=2", "--ratio=0.25", "--block_size=2x2x2",
        "--fps=12", "--seed=0", "--json", "-o", str(output),
    )  # fmt: skip
    assert code == 0, printed.err
    told = json.loads(printed.out)
    assert (told["frames"], told["height"], told["width"], told["fps"], told["audio"]) == (9, 64, 64, 12, False)
    read = read_frames(output)
    assert read.shape == (9, 64, 64, 3)
    assert np.abs(read.astype(float) - sparse).mean() < 3  # compression


def test_a_config_file_and_a_directory_and_patterns_are_read(tmp_path):
    config = VSAConfig(**SPARSE)
    config.save_pretrained(tmp_path)
    patterns = {"*.attn1": {"top_k_ratio": 0.25, "block_size_3d": [2, 2, 2]}, "default": {"enable": False}}
    (tmp_path / "patterns.json").write_text(json.dumps(patterns))
    assert read_config(tmp_path) == config
    assert read_config(tmp_path / "vsa_config.json") == config
    assert read_config(tmp_path / "patterns.json")["*.attn1"] == SPARSE | dict(enable=True)
    for content in ('{"top_k_ratio": 2}', '{"x": 1}', "[]"):
        (tmp_path / "wrong.json").write_text(content)
        with pytest.raises(ValueError) as error:
            read_config(tmp_path / "wrong.json")
        assert "wrong.json" in str(error.value)


def test_dense_and_keeping_every_tile_are_the_same_video_and_keeping_few_is_another(tmp_path, sparse):
    dense = frames(tmp_path, dense=True)
    whole = frames(tmp_path, changes=SPARSE | dict(top_k_ratio=1.0))
    assert np.abs(dense.astype(float) - whole).max() <= 2
    assert np.abs(dense.astype(float) - sparse).mean() > 0.05


def test_gates_a_lora_and_fine_tuned_weights_change_the_video(tmp_path, sparse):
    def transformer():
        return diffusers.WanTransformer3DModel.from_pretrained(MODEL, subfolder="transformer")

    gated = fine_tuned(transformer())
    save_gates(gated, tmp_path / "gates")
    save_vsa(gated, tmp_path / "vsa")
    lora = get_peft_model_state_dict(fine_tuned(transformer(), lora=True, gates=False))
    diffusers.WanPipeline.save_lora_weights(tmp_path / "lora", transformer_lora_layers=lora)
    with_gates = frames(tmp_path, changes=SPARSE, gates=tmp_path / "gates")
    with_both = frames(tmp_path, changes=SPARSE, gates=tmp_path / "gates", lora=tmp_path / "lora")
    tuned = frames(tmp_path, changes=dict(top_k_ratio=0.25), vsa=tmp_path / "vsa")
    assert np.abs(with_gates.astype(float) - sparse).mean() > 0.05
    assert np.abs(with_both.astype(float) - with_gates).mean() > 0.05
    assert np.abs(tuned.astype(float) - sparse).mean() > 0.05


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--image", f"{MODEL}/config.json"], "does not exist"),
        (["--set", "audio=1"], "audio: WanPipeline takes no such argument; leave it out. It takes prompt,"),
        (["--set", "audio"], "'audio' is not of the form NAME=VALUE"),
        (["--ratio", "2"], "top_k_ratio=2.0"),
        (["--dense", "--ratio", "0.2"], "dense together with changes"),
        (["--output", "video.txt"], "video.txt"),
        (["--dtype", "int8"], "dtype='int8'"),
        (["--offload", "model", "--device", "cpu"], "offload='model'"),
        (["--device", "cuda:99"], "device='cuda:99' cannot be used by PyTorch"),
        (["--device", "gpu"], "device='gpu' cannot be used by PyTorch"),
        (["--guidance-parallel"], "torchrun"),
        (["--vsa", "here", "--config", "there"], "brings its own config"),
    ],
    ids=lambda each: each[0].lstrip("-") if isinstance(each, list) else "",
)
def test_what_cannot_be_is_refused_in_a_sentence_and_nothing_is_written(
    capsys, monkeypatch, tmp_path, options, message
):
    monkeypatch.chdir(tmp_path)
    code, printed = run(capsys, "--frames=9", "--height=64", "--width=64", "--steps=1", *options)
    assert code == script.REFUSED
    assert message in " ".join(printed.err.split())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "options",
    [["--device", "cuda:99"], ["--offload", "model", "--device", "cpu"]],
    ids=["device", "offload"],
)
@pytest.mark.parametrize("command", ["generate", "compare", "inspect", "tune"])
def test_where_it_cannot_run_is_refused_before_the_model_is_loaded(capsys, command, options):
    target = ["--psnr", "30"] if command == "tune" else []
    with pytest.raises(SystemExit) as ended:
        app.main([command, "nobody/nothing", "a", *target, *options])  # which loading would refuse
    assert ended.value.code == script.REFUSED
    assert "here" in (said := capsys.readouterr().err) or "use 'none' on the CPU" in said
    assert "nobody" not in said


@pytest.mark.parametrize(
    ("place", "message"),
    [("file/{}", "is not a directory; choose another"), ("/proc/{}", "nothing can be written in /proc (")],
    ids=["file", "proc"],
)
@pytest.mark.parametrize("command", ["generate", "compare", "inspect", "tune"])
def test_where_nothing_can_be_written_is_refused_before_the_model_is_loaded(
    capsys, monkeypatch, tmp_path, command, place, message
):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    target = ["--psnr", "30"] if command == "tune" else []
    output = place.format("new.mp4" if command == "generate" else "new")
    with pytest.raises(SystemExit) as ended:
        app.main([command, "nobody/nothing", "a", *target, "--output", output])  # which loading would refuse
    assert ended.value.code == script.REFUSED
    said = " ".join(capsys.readouterr().err.split())
    assert message in said
    assert "nobody" not in said


@pytest.mark.parametrize("model", ["./not_there", str(Path(MODEL) / "vae")])
def test_what_is_no_pipeline_is_refused(capsys, model):
    with pytest.raises(SystemExit) as ended:
        app.main(["generate", model, "a"])
    assert ended.value.code == script.REFUSED
    assert model in " ".join(capsys.readouterr().err.split())


def test_what_the_hub_does_not_give_is_refused_with_the_cause(capsys, monkeypatch):
    def offline(*arguments, **options):
        raise OSError("see the stacktrace above") from ConnectionError("no route to host")

    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", offline)
    with pytest.raises(SystemExit) as ended:
        app.main(["generate", "nobody/nothing", "a"])
    assert ended.value.code == script.REFUSED
    told = " ".join(capsys.readouterr().err.split())
    assert "model='nobody/nothing': no such directory, and the Hugging Face Hub did not give" in told
    assert "(no route to host); check the path, or the name and the connection." in told


def test_a_video_of_nan_is_refused_and_nothing_is_written(tmp_path, monkeypatch):
    load = generation.load_pipeline

    def broken(*args, **kwargs):
        pipe = load(*args, **kwargs)
        next(pipe.transformer.parameters()).data.fill_(torch.nan)
        return pipe

    monkeypatch.setattr(generation, "load_pipeline", broken)
    with pytest.raises(ValueError) as error:
        frames(tmp_path)
    assert "NaN" in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_sound_is_kept_with_its_rate():
    vocoder = LTX2Vocoder(in_channels=32, hidden_channels=32, output_sampling_rate=24000)
    parts = dict(text_encoder=None, tokenizer=None, vocoder=vocoder.eval()) | ltx2()
    pipe = diffusers.LTX2Pipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    call = call_arguments(pipe, **ltx2_embeddings(), **TINY, num_inference_steps=1, fps=12)
    video = call_pipeline(pipe, call, seed=0)
    assert video.frames.shape == (5, 32, 32, 3)
    assert (video.fps, video.sample_rate) == (12, 24000)
    assert video.audio.ndim == 2
    assert video.audio.shape[0] == 2
    assert abs(video.audio.shape[1] / video.sample_rate - 5 / 12) < 0.1


def test_an_image_is_asked_for_and_read(tmp_path):
    cls = diffusers.WanImageToVideoPipeline
    with pytest.raises(ValueError) as error:
        call_arguments(cls, prompt="a")
    assert "image" in str(error.value)
    Image.new("L", (8, 8), 77).save(tmp_path / "first.png")
    image = call_arguments(cls, prompt="a", image=tmp_path / "first.png")["image"]
    assert (image.mode, image.getpixel((0, 0))) == ("RGB", (77, 77, 77))


@pytest.mark.parametrize(
    ("name", "arguments", "rate"),
    [
        ("WanPipeline", {}, 16),
        ("LTXPipeline", {}, 25),
        ("LTX2Pipeline", {"frame_rate": 30}, 30),
        ("MochiPipeline", {}, 30),
    ],
)
def test_frames_are_meant_to_be_seen_at_the_pipelines_rate(name, arguments, rate):
    cls = getattr(diffusers, name)
    assert frames_per_second(cls.__new__(cls), arguments) == rate


def test_settings_as_text_are_fields():
    text = "ratio=0.2,dense-steps=2,dense_layers=0,-1,block_size=auto,modules=*.0.*+*.1.*"
    assert read_fields(text) == {
        "top_k_ratio": 0.2, "dense_steps": 2, "dense_layers": (0, -1), "block_size": "auto",
        "modules": ("*.0.*", "*.1.*"),
    }  # fmt: skip
    assert read_fields("block_size=4x4x4,dense_steps=0.2") == {"block_size": (4, 4, 4), "dense_steps": 0.2}
    assert read_fields("ratio=0.3,schedule=front") == {"top_k_ratio": 0.3, "schedule": "front"}
    ramp = RatioSchedule.ramp(0.8, 0.05, power=2)
    assert read_fields("schedule=0.8:0.05:2,dense_steps=1") == {"schedule": ramp, "dense_steps": 1}
    assert read_fields("schedule=.5:.05") == {"schedule": RatioSchedule.ramp(0.5, 0.05)}
    with pytest.raises(ValueError) as error:
        read_fields("speed=3")
    assert "speed" in str(error.value)
    with pytest.raises(ValueError) as error:
        read_fields("0.2")
    assert "NAME=VALUE" in str(error.value)


def test_other_arguments_are_json_or_text():
    assert named_arguments(["a=3", "b=1.5", 'c="x"', "d=x", "e=[1, 2]"]) == dict(a=3, b=1.5, c="x", d="x", e=[1, 2])


def test_there_is_nothing_to_offload_from_on_a_cpu():
    with pytest.raises(ValueError) as error:
        place(None, "cpu", "group")
    assert "'group'" in str(error.value)


def test_a_schedule_is_an_option_too():
    ramp = RatioSchedule.ramp(0.5, 0.05, power=2)
    assert options.sparse_fields(schedule="0.5:0.05:2", top_k=None) == {"schedule": ramp}


def test_a_schedule_that_does_not_exist_is_refused_by_name():
    with pytest.raises(ValueError) as error:
        check_sparse(options.sparse_fields(schedule="back"))
    assert "schedule='back' is unknown" in str(error.value)
