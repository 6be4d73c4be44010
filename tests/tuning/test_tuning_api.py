"""`tune`: what it measures against `inspect_attention` and direct runs, how it shares a budget, and what it leaves."""

import itertools
import json
import math
import re
import shutil
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
import torch._dynamo.testing
from made_up_tuning import made_up
from PIL import Image

from tiny_fine_tuned import fine_tuned
from tiny_text_pipeline import tiny_pipeline
from vsa_diffusers import VSAConfig, disable_vsa, enable_vsa
from vsa_diffusers.comparison.api import measure_settings
from vsa_diffusers.comparison.measure import attending
from vsa_diffusers.comparison.store import MemoryStore, told
from vsa_diffusers.generation.sparsity import read_config
from vsa_diffusers.inspection import inspect_attention
from vsa_diffusers.pipeline import enabled_config, supported_parts
from vsa_diffusers.tiles import TileGrid
from vsa_diffusers.tuning import api, tune
from vsa_diffusers.tuning import probe as probing
from vsa_diffusers.tuning.probe import RATIOS, REFERENCE
from vsa_diffusers.tuning.replay import error_of, record, replay
from vsa_diffusers.tuning.report import columns, verdict
from vsa_diffusers.tuning.search import SHAPES, Cost, Search

PROMPT = "a red ring"
CALL = dict(height=64, width=96, num_frames=13, num_inference_steps=3, max_sequence_length=16, guidance_scale=3.0)
BLOCK = (1, 2, 2)


@pytest.fixture(scope="module")
def pipe():
    torch.manual_seed(0)
    pipe = tiny_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def calls(pipe):
    return record(pipe, CALL | {"prompt": PROMPT}, 0, 3)


def tuned(pipe, directory, **options):
    shared = dict(arguments=CALL, blocks=[BLOCK], rounds=1, schedules=["constant", "front"])
    if not {"psnr", "ssim", "error", "speedup"} & options.keys():
        options["psnr"] = 15.0
    return tune(pipe, PROMPT, directory, **shared | options)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("tuning")


@pytest.fixture(scope="module")
def tuning(pipe, directory):
    return tuned(pipe, directory)


def test_recorded_calls_are_the_dense_run_s_and_repeat_it(pipe, calls):
    assert [(call.step, call.run) for call in calls] == [(step, run) for step in range(3) for run in range(2)]
    assert all(output.equal(call.output) for call, output in replay(supported_parts(pipe), calls))


def test_a_repeated_call_knows_its_step(pipe, calls):
    parts = supported_parts(pipe)
    with attending(pipe, VSAConfig(0.1, block_size=BLOCK, dense_steps=2)):
        assert error_of(parts, calls[:4]) == 0
        assert error_of(parts, calls[4:]) > 1e-3


def test_a_transformer_that_remembers_is_refused(pipe, tmp_path):
    count = itertools.count(1)
    handle = pipe.transformer.register_forward_hook(lambda module, args, output: (output[0] * next(count),))
    try:
        with pytest.raises(ValueError, match="another output when it is called again"):
            tuned(pipe, tmp_path)
    finally:
        handle.remove()


def test_layers_errors_are_those_of_an_inspection(pipe, tuning):
    config = VSAConfig(REFERENCE, block_size=BLOCK, selection=tuning.probe.tiling.selection)
    inspected = inspect_attention(pipe, PROMPT, config=config, steps=3, **CALL)
    squares = {}
    for each in inspected.observations:
        squares.setdefault((each.layer.position, each.step), []).append(each.error**2)
    for (layer, step), found in squares.items():
        ours = tuning.probe.errors[layer, step, RATIOS.index(REFERENCE)]
        assert ours == pytest.approx(np.mean(found) ** 0.5, rel=1e-4)


def test_gains_take_a_layer_s_error_to_the_output(pipe, calls, tuning):
    config = VSAConfig(REFERENCE, block_size=BLOCK, selection=tuning.probe.tiling.selection, dense_layers=(1,))
    assert len(tuning.probe.layers) == 2
    with attending(pipe, config):
        first = [error_of(supported_parts(pipe), [call]) for call in calls if call.run == 0]
    predicted = tuning.probe.gains[0] * tuning.probe.errors[0, :, RATIOS.index(REFERENCE)]
    assert predicted == pytest.approx(first, rel=1e-3)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_an_allocation_keeps_what_it_says(pipe, tuning, shape, tmp_path):
    search = Search(tuning.probe, tuning.cost, shape)
    allocation = next(each for each in search.walk if each.kept > 0.45 and len(set(each.levels)) == 2)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(allocation.config(tuning.probe)))
    kept = []

    def note(module, args):
        state = getattr(module.processor, "state", None)
        is_dense = state is None or state.dense_step
        kept.append(1.0 if is_dense else state.kept / TileGrid(state.video_shape, state.block_size).num_tiles)

    handles = [block.attn1.register_forward_pre_hook(note) for block in pipe.transformer.blocks]
    try:
        enable_vsa(pipe, config=read_config(path))
        pipe(prompt=PROMPT, output_type="latent", **CALL)
    finally:
        disable_vsa(pipe)
        for handle in handles:
            handle.remove()
    assert len(kept) == 2 * 2 * 3
    assert np.mean(kept) == pytest.approx(allocation.kept)
    assert allocation.cost == pytest.approx(allocation.kept)
    assert allocation.shares(tuning.probe).mean() == pytest.approx(allocation.kept)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ({}, "one target is needed.*none"),
        ({"psnr": 30.0, "speedup": 1.5}, "psnr=30.0 and speedup=1.5"),
        ({"ssim": 1.5}, r"ssim=1.5 must be similarity .* such as 0.95"),
        ({"speedup": 0.9}, r"speedup=0.9 must be times as fast"),
        ({"psnr": math.nan}, r"psnr=nan must be"),
    ],
)
def test_targets_that_cannot_be_are_refused(pipe, tmp_path, targets, message):
    with pytest.raises(ValueError, match=message):
        tune(pipe, PROMPT, tmp_path / "none", **targets)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedules": "front"}, "schedules='front' must be a list"),
        ({"selections": []}, r"selections=\[\] must be a list"),
        ({"rounds": 1.5}, "rounds=1.5 must be a whole number"),
        ({"arguments": CALL | {"prompt": "b"}}, "arguments has prompt='b'; pass it among prompts="),
        ({"arguments": CALL | {"num_inference_steps": 0}}, "num_inference_steps=0 must be"),
    ],
    ids=["text", "none", "rounds", "prompt", "steps"],
)
def test_choices_that_cannot_be_are_refused(pipe, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        tuned(pipe, tmp_path / "none", **options)
    assert not (tmp_path / "none").exists()


def test_it_writes_what_enable_vsa_takes_and_leaves_the_pipeline_as_it_was(pipe, directory, tuning):
    config = json.loads((directory / "config.json").read_text())
    assert tuning.is_met
    assert config == json.loads(json.dumps(tuning.best.config))
    assert tuning.best.psnr >= 15
    with pytest.raises(ValueError, match="not enabled"):
        enabled_config(pipe.transformer)
    with attending(pipe, config):
        assert enabled_config(pipe.transformer) == read_config(directory / "config.json")
    numbers = json.loads((directory / "results.json").read_text())
    assert numbers["best"] == tuning.best.name
    assert {each["schedule"].removesuffix(", even") for each in numbers["points"]} == {"constant", "front", "default"}
    # Schedules are compared with all layers alike; the best of them is tried with a ratio for each layer, too.
    by_layer = {each["schedule"] for each in numbers["points"]} & {"constant", "front"}
    assert len(by_layer) == 1
    assert {f"{name}, even" for name in ("constant", "front")} < {each["schedule"] for each in numbers["points"]}
    assert len(list((directory / "videos").glob("*.mp4"))) == 1 + len(numbers["points"])
    page = (directory / "report.html").read_text()
    assert tuning.cost.reason in page
    assert page.count("data:image/png") == 3
    assert not re.search(r'(?:src|href)="(?!data:)', page)


def test_costs_have_a_column_only_where_they_are_times(tuning):
    timed = replace(tuning, cost=Cost({0.0: 2.0, 0.25: 1.0, 0.5: 1.5}, 0.0, 2, "time of the layers"))
    for found, heading, words in ((tuning, (), "of the tiles,"), (timed, ("cost",), "of dense attention's time,")):
        headings, rows = columns(found)
        assert headings == ("setting", *heading, "tiles kept", "times dense", "PSNR, dB", "SSIM", "")
        assert {len(row) for row in rows} == {len(headings)}
        assert [row[0] for row in rows if row[-1]] == [found.best.name]
        assert words in verdict(found)
        assert [column.header for column in found.table().columns] == list(headings)


def test_another_target_makes_only_what_is_new_and_a_missed_one_leaves_no_config(pipe, directory, tuning, monkeypatch):
    monkeypatch.setattr(api, "record", pytest.fail)
    shutil.copytree(directory, other := directory.with_name("other"))
    missed = tuned(pipe, other, psnr=200.0, rounds=0, schedules=["front"])
    known = {each.name: each for each in tuning.points}
    both = [(each, known[each.name]) for each in missed.points if each.name in known]
    assert both
    for ours, theirs in both:
        assert (ours.config, ours.speedup) == (theirs.config, theirs.speedup)
        assert ours.psnr == pytest.approx(theirs.psnr)
    assert not missed.is_met
    assert not (other / "config.json").exists()
    assert "No setting that was tried reaches PSNR of 200 dB" in (other / "report.html").read_text()


@pytest.fixture
def copied(directory, tuning, tmp_path, monkeypatch):
    """A finished tuning in a directory of its own, which makes no dense run any more."""
    monkeypatch.setattr(api, "record", pytest.fail)
    return shutil.copytree(directory, tmp_path / "copied")


def test_videos_of_an_earlier_tuning_are_not_shown_as_its_own(pipe, copied):
    tuned(pipe, copied, rounds=0, schedules=["constant"], keep_videos=False, blocks=[list(BLOCK)])
    assert "videos/report.html" not in (copied / "report.html").read_text()


def test_a_config_of_another_target_never_stands_beside_a_new_report(pipe, copied, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("vsa_diffusers.tuning.report.write_report", interrupted)
    assert (copied / "config.json").exists()
    with pytest.raises(KeyboardInterrupt):
        tuned(pipe, copied)
    assert not (copied / "config.json").exists()


def test_another_scheduler_or_model_is_another_tuning(pipe, copied, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(pipe, "scheduler", diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0))
        with pytest.raises(ValueError, match=r"has scheduler=.*'shift': 3.0.* instead of .*'shift': 5.0"):
            tuned(pipe, copied)
    with pytest.raises(ValueError, match=r"has prompts=\['a red ring'\] instead of \['a blue ring'\]"):
        tune(pipe, "a blue ring", copied, psnr=15.0, arguments=CALL)
    facts = api.facts_of(pipe)
    monkeypatch.setattr(api, "facts_of", lambda pipe: facts | {"model": "another"})
    with pytest.raises(ValueError, match="has model='WanPipeline' instead of 'another'"):
        tuned(pipe, copied)


def test_videos_of_another_scheduler_are_not_taken_for_these(pipe, tmp_path, monkeypatch):
    store, few = MemoryStore(), CALL | {"num_inference_steps": 1}
    made = [measure_settings(pipe, PROMPT, [0.5], tmp_path, store, arguments=few) for _ in range(2)]
    assert [each.results[0].reused for each in made] == [(False,), (True,)]
    monkeypatch.setattr(pipe, "scheduler", diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0))
    other = measure_settings(pipe, PROMPT, [0.5], tmp_path, store, arguments=few)
    assert other.results[0].reused == (False,)


def test_images_are_told_by_what_they_show():
    def shown(colour, size=(4, 2)):
        return told({"last_image": Image.new("RGB", size, colour), "video": [Image.new("RGB", size, colour)]})

    assert shown("red") == shown("red") == json.loads(json.dumps(shown("red")))
    assert shown("red") != shown("blue")
    assert shown("red") != shown("red", (2, 4))
    assert told({"latents": torch.zeros(2000)}) != told(
        {"latents": torch.zeros(2000).index_fill(0, torch.tensor(999), 1)}
    )
    assert told({"height": 64, "prompt": PROMPT}) == {"height": 64, "prompt": PROMPT}


def test_a_pipeline_that_is_sparse_is_measured_dense(pipe, tmp_path, monkeypatch):
    def watched(pipe, *args):
        with pytest.raises(ValueError, match="not enabled"):
            enabled_config(pipe.transformer)
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "probe", watched)
    mine = VSAConfig(0.3, block_size=BLOCK)
    with attending(pipe, mine):
        with pytest.raises(KeyboardInterrupt):
            tuned(pipe, tmp_path)
        assert enabled_config(pipe.transformer) == mine


def test_an_error_of_the_transformer_is_a_target_too(pipe, calls, tmp_path):
    found = tuned(pipe, tmp_path, error=0.5, schedules=["constant"], rounds=0, keep_videos=False)
    assert found.is_met
    assert not (tmp_path / "videos").exists()
    with attending(pipe, found.best.config):
        assert found.best.error == pytest.approx(error_of(supported_parts(pipe), calls), rel=1e-4)


def test_levels_of_layers_share_their_compiled_graphs(pipe):
    torch._dynamo.reset()
    probe = made_up([0.3, 0.05], tiles=40)
    allocation = Search(probe, Cost.of_probe(probe), SHAPES["front"]).at(0.2)  # no step is dense
    assert len(set(allocation.levels)) == 2
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    enable_vsa(pipe, config=allocation.config(probe))
    try:
        for block in pipe.transformer.blocks:
            block.compile(backend=counter)
        pipe(prompt=PROMPT, output_type="latent", **CALL)
    finally:
        disable_vsa(pipe)
        for block in pipe.transformer.blocks:
            block._compiled_call_impl = None
    assert counter.frame_count <= 2


def test_trained_gates_are_refused(tmp_path):
    pipe = tiny_pipeline()
    disable_vsa(fine_tuned(pipe.transformer))
    with pytest.raises(ValueError, match="transformer has trained gates"):
        tuned(pipe, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_two_experts_are_tuned_together(tmp_path):
    pipe = tiny_pipeline(experts=2)
    pipe.set_progress_bar_config(disable=True)
    found = tuned(pipe, tmp_path, psnr=5.0, schedules=["constant"], rounds=0, keep_videos=False)
    assert len(supported_parts(pipe)) == 2
    assert found.probe.steps == (0, 1, 2)
    assert found.probe.layers == ("blocks.0.attn1", "blocks.1.attn1")


def test_times_are_measured_when_asked_for_on_each_hardware(pipe, tmp_path, monkeypatch):
    options = dict(speedup=1.5, measure=True, schedules=["constant"], rounds=0, keep_videos=False)
    found = tuned(pipe, tmp_path, **options)
    assert sorted(found.probe.times) == [0.0, *RATIOS]
    assert min(found.probe.times.values()) > 0
    assert found.probe.rest > 0
    words = "time of the layers" if found.cost.is_time else "vary too much"
    assert words in (tmp_path / "report.html").read_text()
    assert found.is_met == (max(each.speedup for each in found.points) >= 1.5)

    times = dict.fromkeys((0.0, *RATIOS), 1.0)
    monkeypatch.setattr(probing, "_times", lambda *_: {"of": times, "spread": 0.0, "rest": 1.0})
    assert tuned(pipe, tmp_path, **options).probe.times == found.probe.times
    monkeypatch.setattr(probing, "facts_of", lambda pipe: {"hardware": "another"})
    assert tuned(pipe, tmp_path, **options).probe.times == times


@pytest.mark.slow
def test_what_is_compiled_is_compiled_after_the_probe(tmp_path, monkeypatch):
    pipe = tiny_pipeline()
    pipe.set_progress_bar_config(disable=True)
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    monkeypatch.setattr(
        api, "compile_blocks", lambda pipe: [block.compile(backend=counter) for block in pipe.transformer.blocks]
    )
    found = tuned(pipe, tmp_path, error=0.5, schedules=["front"], rounds=0, keep_videos=False, compile=True)
    assert found.is_met
    assert counter.frame_count
    with pytest.raises(ValueError, match="pipe is compiled"):
        tuned(pipe, tmp_path)
