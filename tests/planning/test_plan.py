"""`plan` as a whole: what it says of models and sizes, and what it refuses."""

import io
import json
import math
import shutil
import sys
from pathlib import Path

import huggingface_hub
import pytest
from rich.console import Console

from vsa_diffusers.models import known_families
from vsa_diffusers.planning import plan
from vsa_diffusers.planning.advice import EXCELLENT, MARGINAL, TOO_SMALL, grid_of, verdict
from vsa_diffusers.planning.measuring import Timed
from vsa_diffusers.planning.models import family_names, published_ids, resolve
from vsa_diffusers.planning.published import PUBLISHED
from vsa_diffusers.recipes import NAMES, size_class, usual_size_class

TINY_WAN = Path(__file__).parents[2] / "examples" / "tiny_wan"


def printed(result, width=80):
    console = Console(width=width, file=io.StringIO())
    console.print(result)
    return console.file.getvalue()


@pytest.fixture(scope="module")
def ltx2():
    return plan("ltx2")


def test_ltx_2_at_its_usual_size_is_marginal_and_gains_seven_percent(ltx2):
    assert (ltx2.tokens, ltx2.tiles, ltx2.block, ltx2.padding) == (6144, 96, (4, 4, 4), 0)
    assert ltx2.kind == MARGINAL
    [at] = [speed for speed in ltx2.speeds if speed.ratio == 0.2]
    assert at.kept_tiles == 20
    assert at.model == pytest.approx(1.07, abs=0.01)
    assert any("the whole transformer is 1.07 times as fast at 0.2" in note for note in ltx2.notes)


def test_a_plan_is_json_and_fits_eighty_columns(ltx2):
    assert json.loads(json.dumps(ltx2.to_dict()))["video_shape"] == [16, 16, 24]
    text = printed(ltx2)
    assert "16x16x24 = 6 144" in text
    assert "h100-quarters.json" in text
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("name", ["wan", "WAN", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "wan-ai/wan2.1-t2v-1.3b-diffusers"])
def test_a_family_and_its_checkpoint_are_the_same_plan(name):
    known = resolve(name)
    assert (known.costs.heads, len(known.costs.layers), known.vae) == (12, 30, (4, 8))


def test_every_checkpoint_of_every_family_is_known_without_a_network():
    ids = {name for family in known_families() for name in (*family.checkpoints, *family.trained_gates)}
    assert ids <= set(published_ids())
    assert len(set(published_ids())) == len(published_ids())
    modules = {family.processor.__module__.rpartition(".")[2] for family in known_families()}
    assert modules <= set(family_names())
    assert all(row.source for row in PUBLISHED)


def test_a_whole_transformer_that_was_measured_is_told_beside_the_estimate():
    result = plan("wan", ratios=[0.2])
    assert result.speeds[0].model == pytest.approx(1.57, rel=0.02)
    assert any("1.57 times as fast at 0.2" in note for note in result.notes)
    assert not any("times as fast at 0.2" in note for note in plan("wan", 480, 832, 77, ratios=[0.2]).notes)


def test_a_short_video_is_too_small_and_has_no_recipe():
    result = plan("ltx2", 384, 384, 49)
    assert (result.tokens, result.kind, result.recipes) == (1008, TOO_SMALL, ())
    assert all(speed.layer < 1 for speed in result.speeds)


@pytest.mark.parametrize(
    ("tokens", "kind"), [(256, TOO_SMALL), (1023, TOO_SMALL), (1024, MARGINAL), (16383, MARGINAL), (16384, EXCELLENT)]
)
def test_the_class_follows_the_tokens(tokens, kind):
    assert verdict(tokens) == kind


def test_padding_that_hurts_brings_a_block_and_a_size():
    result = plan("wan", block_size=(4, 4, 4))
    assert result.kind == EXCELLENT
    assert any('block_size="auto" takes 3x5x4' in sentence for sentence in result.advice)
    [better] = [sentence for sentence in result.advice if "A size that fits nearby" in sentence]
    height, width = map(int, better.split(": ")[1].split(" ")[0].split("x"))
    frames = int(better.split("and ")[1].split(" ")[0])
    assert plan("wan", height, width, frames, block_size=(4, 4, 4)).waste < result.waste - 0.04


def test_trained_gates_keep_their_block_and_bring_no_recipe():
    result = plan("FastVideo/FastWan2.1-T2V-1.3B-Diffusers", ratios=[0.2])
    assert (result.combine, result.block, result.recipes) == ("gate", (4, 4, 4), ())
    with pytest.raises(ValueError, match='block_size="auto" does not fit trained gates'):
        plan("FastVideo/FastWan2.1-T2V-1.3B-Diffusers", block_size="auto")


def test_the_recipes_gain_more_the_lower_their_ratio(ltx2):
    assert [each.name for each in ltx2.recipes] == list(NAMES)
    gains = [each.speedup for each in ltx2.recipes]
    assert gains == sorted(gains)


def test_recipes_take_families_for_as_large_as_their_usual_videos_are(models):
    for name, known in models.items():
        _, grid = grid_of(known, known.size)
        assert usual_size_class(known.costs.family.name) == size_class(math.prod(grid)), name


@pytest.mark.parametrize("folder", [".", "transformer"])
def test_a_folder_is_read(folder):
    result = plan(str(TINY_WAN / folder), 256, 256, 61, ratios=[0.25])
    assert (result.video_shape, result.tokens, result.heads) == ((16, 16, 16), 4096, 2)
    assert any("the VAE's compression" in note for note in result.notes) == (folder == "transformer")


def test_a_folder_is_planned_for_at_the_size_and_steps_that_it_recommends():
    result = plan(str(TINY_WAN), ratios=[0.25])
    assert (result.size, result.tokens) == ((256, 256, 61), 4096)
    assert plan(str(TINY_WAN), frames=29, ratios=[0.25]).size == (256, 256, 29)
    assert resolve(str(TINY_WAN)).steps == 20


def test_a_hub_id_is_asked_for_its_configurations_alone(monkeypatch):
    asked = []

    def snapshot(repo, allow_patterns, **_):
        asked.append((repo, allow_patterns))
        return str(TINY_WAN)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert plan("somebody/tiny-wan", 256, 256, 61, ratios=[0.25]).tokens == 4096
    assert asked == [("somebody/tiny-wan", ["model_index.json", "config.json", "*/config.json"])]


def test_without_a_network_an_unknown_id_is_one_clear_error(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ValueError, match=r"is not among the .* known without a network, and the Hugging Face Hub did"):
        plan("somebody/something")


def test_a_measured_layer_is_timed_here_and_scaled_to_all_heads():
    told = []
    result = plan(str(TINY_WAN), 128, 128, 13, ratios=[0.5], measure=True, progress=told.append)
    assert "timed here on random inputs with 1 of 2 heads in fp32, and scaled to all" in result.origin
    assert result.reach == "measured"
    assert result.dense_ms > 0
    assert told[-1] == "ratio 0.5"


def wrong_folder(tmp_path, **index):
    (tmp_path / "transformer").mkdir()
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    shutil.copy(TINY_WAN / "transformer" / "config.json", tmp_path / "transformer")
    return str(tmp_path)


def test_a_pipeline_without_a_video_transformer_is_refused(tmp_path):
    folder = wrong_folder(tmp_path, transformer=["diffusers", "FluxTransformer2DModel"])
    with pytest.raises(ValueError, match=r"has no supported video transformer .found: FluxTransformer2DModel"):
        plan(folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("wn",), r"MODEL='wn' is neither a family, .* \(perhaps wan is meant\); families are allegro, "),
        (("wan", 500), "height=500 is no multiple of 16, .* the nearest are 496 and 512"),
        (("wan", 480, 0), "width=0 must be at least 1"),
        ((str(TINY_WAN.parent),), "holds neither model_index.json nor config.json"),
    ],
)
def test_what_is_refused_says_why(arguments, message):
    with pytest.raises(ValueError, match=message):
        plan(*arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(gpu="A100"), "gpu='A100' has no shipped measurements; choose H100 or H200"),
        (dict(ratios=[2]), r"top_k_ratio=2 must be in \(0, 1\]"),
        (dict(ratios=[]), "ratios=.. must hold at least one"),
        (dict(block_size="big"), "block_size='big' must be three numbers"),
        (dict(block_size=(4, 4)), "block_size=.4, 4. must be three positive integers"),
    ],
)
def test_an_option_that_is_wrong_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        plan(str(TINY_WAN), 256, 256, 61, **options)


def test_an_h200_has_layers_and_whole_models_of_its_own():
    result = plan("wan", ratios=[0.2], gpu="H200")
    assert result.reach == "measured"
    assert "h200-quarters-auto.json" in result.origin
    assert result.speeds[0].model == pytest.approx(1.66, rel=0.03)
    assert any("Measured on one H200: the whole transformer is 1.66 times as fast" in note for note in result.notes)


def test_what_is_timed_here_has_the_rest_of_this_gpu(monkeypatch):
    def speedup_on(gpu):
        timed = Timed(f"NVIDIA {gpu}", 10.0, {0.1: 1.0, 0.2: 2.0, 0.3: 3.0}, 12)
        monkeypatch.setattr(sys.modules[plan.__module__], "time_layer", lambda *_: timed)
        return plan("wan", ratios=[0.2], gpu="H100", measure=True).speeds[0].model

    assert speedup_on("H200 NVL") > speedup_on("H100 80GB HBM3")
