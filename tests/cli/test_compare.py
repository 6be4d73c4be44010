"""`vsa-diffusers compare`: its numbers, its page, and what it need not make again."""

import base64
import json
import math
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanPipeline

from vsa_diffusers import VSAConfig, enable_vsa
from vsa_diffusers.cli import app, script
from vsa_diffusers.comparison import Setting, api, compare, quality
from vsa_diffusers.comparison.measure import _steps_to_warm_up
from vsa_diffusers.comparison.report import write_report
from vsa_diffusers.comparison.settings import read_setting
from vsa_diffusers.comparison.store import fingerprint
from vsa_diffusers.pipeline import enabled_config
from vsa_diffusers.video_files import read_frames

MODEL = str(Path(__file__).parents[2] / "examples" / "tiny_wan")
PROMPTS = ("a red <circle>", "a blue square")
NAMES = ("dense", "VSA 1", "quick")
OPTIONS = (
    "--height=64", "--width=64", "--frames=9", "--steps=2", "--ratio=1.0", "--block_size=2x2x2",
    "--setting=quick=ratio=0.25,dense_steps=1,block_size=2x2x2", "--json",
)  # fmt: skip


class Page(HTMLParser):
    """All that a page refers to, its text, and the names of what one can use on it."""

    def __init__(self, html):
        super().__init__()
        self.references, self.styles, self.text, self.tags, self.open = [], [], [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        self.open.append(tag)
        names = ("src", "href", "poster", "data", "srcset", "action", "xlink:href", "background")
        self.references += [attributes[name] for name in names if name in attributes]
        self.styles.append(attributes.get("style", ""))

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        (self.styles if "style" in self.open or "script" in self.open else self.text).append(data)


def started(directory, *options):
    with pytest.raises(SystemExit) as ended:
        app.main(["compare", MODEL, *PROMPTS, "--output", str(directory), *OPTIONS, *options])
    return ended.value.code


def run(capsys, directory, *options):
    return started(directory, *options), capsys.readouterr()


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("comparison")


@pytest.fixture(scope="module")
def numbers(directory):
    """Those of a comparison that was interrupted before its third video, and then begun again."""
    measure, made = api.measure, []

    def interrupted(*args, **kwargs):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(measure(*args, **kwargs))
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "measure", interrupted)
        assert started(directory) == script.INTERRUPTED
    assert not (directory / "report.html").exists()
    printed = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("typer.echo", printed.append)
        patch.setattr("sys.argv", ["vsa-diffusers", "compare", "a model"])
        assert started(directory) == 0
    return json.loads(printed[0])


@pytest.fixture(scope="module")
def page(directory, numbers):
    return Page((directory / "report.html").read_text(encoding="utf-8"))


def test_json_tells_of_every_setting_and_prompt(numbers, directory):
    assert json.loads((directory / "results.json").read_text()) == numbers
    assert numbers["prompts"] == list(PROMPTS)
    assert [result["name"] for result in numbers["results"]] == list(NAMES)
    dense, whole, quick = numbers["results"]
    assert dense["config"] is None
    assert (quick["config"]["top_k_ratio"], quick["config"]["dense_steps"]) == (0.25, 1)
    assert dense["speedup"] == 1
    for result in numbers["results"]:
        assert len(result["videos"]) == len(PROMPTS)
        for video in result["videos"]:
            assert video["seconds"] > video["denoising"] > 0
            assert video["peak_memory"] is None
        denoising = [video["denoising"] for video in result["videos"]]
        assert result["mean"]["denoising"] == pytest.approx(np.mean(denoising))
        assert result["spread"]["denoising"] == pytest.approx(np.std(denoising, ddof=1))
        assert result["speedup"] == pytest.approx(dense["mean"]["denoising"] / result["mean"]["denoising"])
    for video in whole["videos"]:
        assert video["identical"] or video["psnr"] > 50
    for video in quick["videos"]:
        assert 5 < video["psnr"] < 50
        assert 0 < video["ssim"] < 1


def test_what_was_finished_before_an_interruption_is_not_made_again(numbers):
    assert [[video["reused"] for video in result["videos"]] for result in numbers["results"]] == [
        [True, True], [False, False], [False, False],
    ]  # fmt: skip


def test_files_are_of_the_size_that_was_asked_for(directory, numbers):
    for result in numbers["results"]:
        for video in result["videos"]:
            assert read_frames(directory / video["file"]).shape == (9, 64, 64, 3)
    assert (directory / "contact_sheet.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_refers_to_nothing_outside_itself(page):
    assert page.references
    for reference in page.references:
        assert reference.startswith("data:")
    for style in page.styles:
        for outside in ("url(", "@import", "@font-face", "http:", "https:", "fetch(", "import("):
            assert outside not in style


def test_the_page_plays_every_video_beside_the_others(page):
    videos = [attributes for tag, attributes in page.tags if tag == "video"]
    assert [video["aria-label"] for video in videos] == [*NAMES, *NAMES]
    for video in videos:
        kind, _, content = video["src"].partition(",")
        assert kind == "data:video/mp4;base64"
        assert base64.b64decode(content)[4:8] == b"ftyp"


def test_the_page_tells_settings_numbers_versions_and_prompts(page, numbers):
    text = " ".join(" ".join(page.text).split())
    for expected in (*NAMES, *PROMPTS, "top_k_ratio = 0.25", "dense_steps = 1", torch.__version__, "torchvision"):
        assert expected in text
    for result in numbers["results"]:
        assert f"{result['speedup']:.2f}x" in text
    assert "vsa-diffusers compare 'a model'" in text


def test_whatever_one_can_use_on_the_page_has_a_name(page):
    inputs = [attributes for tag, attributes in page.tags if tag == "input" and attributes["type"] != "checkbox"]
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    figures = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert inputs
    assert images
    assert figures
    assert all(each["aria-label"] for each in [*inputs, *figures])
    assert all(each["alt"] for each in images)
    assert ("html", {"lang": "en"}) in page.tags


def test_with_the_same_settings_nothing_is_made_and_with_another_seed_everything_is(
    capsys, directory, numbers, monkeypatch
):
    def refuse(*args, **kwargs):
        raise ValueError("it was made again")

    monkeypatch.setattr(api, "measure", refuse)
    monkeypatch.setattr(api, "warm_up", refuse)
    code, printed = run(capsys, directory)
    assert code == 0, printed.err
    again = json.loads(printed.out)
    for result, before in zip(again["results"], numbers["results"], strict=True):
        exact = before["mean"] | {"ssim": result["mean"]["ssim"]}  # a mean of fractions, summed in whichever order
        assert result["mean"] == exact
    assert [result["mean"]["ssim"] for result in again["results"][1:]] == pytest.approx(
        [result["mean"]["ssim"] for result in numbers["results"][1:]], rel=1e-6
    )
    for options in (["--seed=5"], ["--anew"]):
        code, printed = run(capsys, directory, *options)
        assert code == script.REFUSED
        assert "it was made again" in printed.err


def timed(comparison, seconds):
    """The comparison, as if denoising had taken so long with each setting."""
    results = [
        replace(result, made=tuple(replace(made, denoising=each) for made in result.made))
        for result, each in zip(comparison.results, seconds, strict=True)
    ]
    return replace(comparison, results=tuple(results))


def test_in_python_it_shows_a_table_and_leaves_the_pipeline_as_it_was(tmp_path):
    pipe = WanPipeline.from_pretrained(MODEL)
    pipe.set_progress_bar_config(disable=True)
    mine = VSAConfig(0.3, block_size=(2, 2, 2))
    enable_vsa(pipe, config=mine)
    size = dict(height=64, width=64, num_frames=9, num_inference_steps=1, max_sequence_length=32)
    made = compare(pipe, "a", [Setting("fast", mine)], tmp_path, arguments=size, reuse=False)
    assert enabled_config(pipe.transformer) == mine
    assert "fast" in made._repr_html_()
    assert made.table().row_count == 2
    assert sorted(each.name for each in tmp_path.iterdir()) == [
        "contact_sheet.png", "dense.mp4", "fast.mp4", "report.html", "results.json",
    ]  # fmt: skip
    assert made.results[1].made[0].video.frames.shape == (9, 64, 64, 3)
    slow = timed(made, [2.0, 2.0])
    assert "Nothing is faster than dense here" in slow.hint
    write_report(tmp_path / "slow.html", slow)
    assert slow.hint in (tmp_path / "slow.html").read_text()
    assert timed(made, [2.0, 1.9]).hint is None
    write_report(tmp_path / "fast.html", timed(made, [2.0, 1.9]))
    assert slow.hint not in (tmp_path / "fast.html").read_text()
    before = fingerprint(pipe)
    next(pipe.transformer.parameters()).data.mul_(1.5)
    assert fingerprint(pipe) != before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--setting=quick=ratio=0.3"], "share a name"),
        (["--setting=ratio"], "NAME=FIELD=VALUE"),
        (["--setting=a=speed=3"], "speed"),
        (["--ratio=0"], "top_k_ratio=0"),
        (["--set=audio=1"], "audio: WanPipeline takes no such argument"),
        (["--set=prompt=b"], "prompt='b'; pass it among prompts="),
        (["--steps=0"], "num_inference_steps=0 must be"),
    ],
    ids=["name", "form", "field", "value", "argument", "prompt", "steps"],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_made(capsys, tmp_path, options, message):
    code, printed = run(capsys, tmp_path / "new", *options)
    assert code == script.REFUSED
    assert message in printed.err
    assert not (tmp_path / "new").exists()


def test_psnr_is_exact_however_many_pixels_there_are():
    random = np.random.default_rng(0)
    frames, reference = (random.integers(0, 256, (17, 48, 64, 3), np.uint8) for _ in range(2))
    squares = sum((int(a) - int(b)) ** 2 for a, b in zip(frames.flat, reference.flat, strict=True))
    exact = 10 * math.log10(255**2 * frames.size / squares)
    assert quality.closeness(frames, reference).psnr == pytest.approx(exact, rel=1e-14)


def test_closeness_of_a_video_to_itself_to_noise_and_to_another_size():
    video = np.random.default_rng(0).integers(0, 256, (10, 32, 48, 3), dtype=np.uint8)
    same = quality.closeness(video, video.copy())
    assert (same.psnr, same.ssim, same.distance) == (math.inf, 1.0, None)
    shifted = np.clip(video.astype(int) + 10, 0, 255).astype(np.uint8)
    error = ((shifted.astype(float) - video) / 255) ** 2
    other = quality.closeness(shifted, video)
    assert other.psnr == pytest.approx(-10 * np.log10(error.mean()), abs=1e-3)
    assert 0.9 < other.ssim < 1
    with pytest.raises(ValueError) as refused:
        quality.closeness(video[:, :16], video)
    assert "[10, 16, 48, 3]" in str(refused.value)


def test_the_learned_distance_is_left_out_with_a_reason_where_its_weights_are_not_installed(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    distance, reason = quality.learned_distance()
    assert distance is None
    assert "AlexNet" in reason
    assert list(tmp_path.iterdir()) == []


def test_a_setting_is_read_from_text_or_a_file(tmp_path):
    VSAConfig(0.3).save_pretrained(tmp_path / "slow")
    assert read_setting("a b=ratio=0.3") == Setting("a b", VSAConfig(0.3))
    assert read_setting(f"named={tmp_path / 'slow'}") == Setting("named", VSAConfig(0.3))
    assert read_setting(str(tmp_path / "slow")) == Setting("slow", VSAConfig(0.3))


@pytest.mark.parametrize(
    ("config", "steps"),
    [
        (None, 1),
        (VSAConfig(0.5), 1),
        (VSAConfig(0.5, dense_steps=3), 4),
        (VSAConfig(0.5, dense_steps=0.2), 2),
        (VSAConfig(0.5, dense_steps=0.75), 4),
        ({"default": {"dense_steps": 2}}, 3),
    ],
)
def test_the_warm_up_has_a_sparse_step_after_the_dense_ones(config, steps):
    assert _steps_to_warm_up(config) == steps


def test_patterns_with_a_schedule_from_a_file_can_be_written_again(tmp_path):
    patterns = {"default": {"enable": True, "schedule": {"points": [[0.0, 0.8], [1.0, 0.1]], "power": 2.0}}}
    path = tmp_path / "settings.json"
    path.write_text(json.dumps(patterns))
    setting = read_setting(f"tuned={path}")
    path.write_text(json.dumps(setting.to_dict()))
    assert read_setting(f"tuned={path}") == setting
