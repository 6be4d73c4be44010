"""`vsa-diffusers tune`: what it is like to use, on the tiny Wan model."""

import json
from pathlib import Path

import pytest

from vsa_diffusers.cli import app, script
from vsa_diffusers.cli.tune import MISSED
from vsa_diffusers.tuning import api, load

MODEL = str(Path(__file__).parents[2] / "examples" / "tiny_wan")
PROMPT = "a large red ring moves left over blue waves"


def run(capsys, *argv):
    with pytest.raises(SystemExit) as ended:
        app.main(list(argv))
    return ended.value.code, capsys.readouterr()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "one target is needed"),
        (["--psnr", "30", "--schedule", "steeper"], "schedules='steeper'"),
        (["--psnr", "30", "--block-size", "4x4x9"], "block_size=(4, 4, 9)"),
        (["--psnr", "30", "--selection", "median"], "selections='median'"),
    ],
)
def test_it_refuses_before_it_loads(options, words, tmp_path, capsys):
    out = tmp_path / "out"
    code, printed = run(capsys, "tune", str(tmp_path / "model"), PROMPT, "--output", str(out), *options)
    assert code == script.REFUSED
    assert words in printed.err
    assert not out.exists()


@pytest.mark.parametrize(
    ("option", "words"),
    [("--set=prompt=x", "prompt='x'; pass it among prompts="), ("--steps=0", "num_inference_steps=0 must be")],
)
def test_it_refuses_calls_that_cannot_be_before_it_loads(option, words, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(load, "load_pipeline", pytest.fail)
    code, printed = run(capsys, "tune", MODEL, PROMPT, "--output", str(tmp_path / "out"), "--psnr=30", option)
    assert code == script.REFUSED
    assert words in printed.err


@pytest.mark.slow
def test_an_interrupted_tuning_goes_on_and_generate_takes_its_config(tmp_path, capsys, monkeypatch):
    out, size = tmp_path / "out", ("--height=128", "--width=128", "--frames=13", "--steps=3")
    command = ("tune", MODEL, PROMPT, "--output", str(out), "--block-size", "2x4x4", "--rounds=1", *size)
    measured = []

    def interrupted(*args, **kwargs):
        if measured:
            raise KeyboardInterrupt
        measured.append(whole(*args, **kwargs))
        return measured[-1]

    whole = api.measure_settings
    with monkeypatch.context() as patch:
        patch.setattr(api, "measure_settings", interrupted)
        code, _ = run(capsys, *command, "--psnr", "12")
    assert code == script.INTERRUPTED
    assert {path.name for path in out.iterdir()} == {"state.json", "videos"}
    made = set((out / "videos" / "frames").iterdir())
    before = {path: path.stat().st_mtime_ns for path in made}

    monkeypatch.setattr(api, "record", pytest.fail)
    code, printed = run(capsys, *command, "--psnr", "12", "--json")
    assert code == 0
    assert {path: path.stat().st_mtime_ns for path in made} == before
    numbers = json.loads(printed.out)
    assert numbers == json.loads((out / "results.json").read_text())
    assert numbers["met"]
    assert next(each for each in numbers["points"] if each["name"] == numbers["best"])["psnr"] >= 12

    video = tmp_path / "video.mp4"
    config = str(out / "config.json")
    code, _ = run(capsys, "generate", MODEL, PROMPT, "--config", config, "--output", str(video), *size)
    assert code == 0
    assert video.exists()

    code, printed = run(capsys, *command, "--psnr", "90")
    assert code == MISSED
    assert "No setting that was tried reaches PSNR of 90 dB" in printed.out.replace("\n", " ")
    assert not Path(config).exists()
    code, printed = run(capsys, *command[:2], "another", *command[3:], "--psnr", "12")
    assert code == script.REFUSED
    assert "is of another tuning" in printed.err
