"""How the ratio changes over a run: every form, in every way that a run is made."""

import contextlib
import copy
import gc
import json
import logging
import math
from dataclasses import replace

import diffusers
import pytest
import torch
import torch._dynamo.testing
from wan_runs import FORCING_INPUTS, FOUR, build, call

from tiny_models import RECIPES, run
from tiny_pipelines_context import helios_pyramid
from tiny_pipelines_joint import cogvideox
from tiny_pipelines_video import FORCING, SIZE, SKYREELS, embeddings, video, wan, wan22
from vsa_diffusers import RatioSchedule, VSAAttnProcessor, VSAConfig, add_gate_compress, enable_vsa, set_top_k_ratio
from vsa_diffusers.config import make_config, module_configs, resolve_config
from vsa_diffusers.models import attention_modules
from vsa_diffusers.pipeline import enabled_config
from vsa_diffusers.processor import FamilyAttnProcessor
from vsa_diffusers.schedule import Share, front_loaded, mean_share, share_of
from vsa_diffusers.steps import Position
from vsa_diffusers.tiles import num_selected_tiles

WAN = RECIPES[0]
GRID = (5, 10, 12)
SQUARE = RatioSchedule.ramp(0.8, 0.05, power=2)
LINE = RatioSchedule(((0.0, 1.0), (0.5, 0.4), (1.0, 0.1)))
FORMS = {
    "constant": dict(top_k_ratio=0.3, schedule="constant"),
    "front": dict(top_k_ratio=0.3, schedule="front"),
    "square": dict(schedule=SQUARE),
    "points": dict(schedule=LINE),
}


@pytest.mark.parametrize(
    ("schedule", "steps", "mean"),
    [
        (SQUARE, 25, 0.305),
        (SQUARE, 8, 0.318),
        (RatioSchedule.ramp(0.55, 0.05, 2), 25, 0.22),
        (RatioSchedule.ramp(0.55, 0.05, 2), 8, 0.229),
        (RatioSchedule.ramp(1.0, 0.05, 2), 25, 0.373),
        (RatioSchedule.ramp(1.0, 0.05, 4), 25, 0.25),
        (RatioSchedule.ramp(0.5, 0.05), 25, 0.275),
        (RatioSchedule.ramp(0.65, 0.05, 2), 20, 0.255),
    ],
)
def test_ramps_have_the_means_that_were_measured_with_them(schedule, steps, mean):
    assert math.fsum(schedule.over(steps)) / steps == pytest.approx(mean, abs=5e-3)
    assert schedule.over(steps)[0] == schedule.points[0][1]
    assert schedule.over(steps)[-1] == schedule.points[-1][1]


def test_points_are_joined_by_lines_and_may_jump():
    schedule = RatioSchedule([(0.0, 1.0), (0.25, 1.0), (0.25, 0.2), (0.75, 0.1)])
    assert [schedule.at(share) for share in (0, 0.2, 0.25, 0.5, 0.75, 1)] == pytest.approx([1, 1, 0.2, 0.15, 0.1, 0.1])
    late = RatioSchedule([(0.5, 0.6), (0.6, 0.2)])
    assert [late.at(share) for share in (0, 0.5, 0.6, 1)] == pytest.approx([0.6, 0.6, 0.2, 0.2])


@pytest.mark.parametrize("schedule", [SQUARE, LINE, RatioSchedule([(0.2, 0.9), (0.2, 0.3), (0.7, 0.1)], 3)])
def test_the_mean_is_that_of_a_run_of_very_many_steps_and_serves_a_run_of_one(schedule):
    assert math.fsum(schedule.over(20000)) / 20000 == pytest.approx(schedule.mean, abs=1e-4)
    assert schedule.over(1) == [schedule.mean]


@pytest.mark.parametrize("mean", [0.01, 0.1, 0.2, 0.4, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 6, 7, 8, 20, 25, 50])
def test_a_budget_is_the_mean_of_its_run_and_is_spent_at_the_front(mean, steps):
    shares = [share_of("front", mean, 0, Position(step, steps)) for step in range(steps)]
    ratios = [share.ratio for share in shares]
    assert math.fsum(ratios) / steps == pytest.approx(mean, rel=1e-9)
    assert mean_share("front", mean, 0, steps) == pytest.approx(mean, rel=1e-9)
    assert all(0 < ratio <= 1 + 1e-12 for ratio in ratios)
    assert ratios == sorted(ratios, reverse=True)
    assert [share.is_dense for share in shares] == [ratio > 1 - 1e-9 for ratio in ratios]


def test_short_runs_fall_as_far_as_long_ones():
    runs = {steps: front_loaded(0.2, steps).over(steps) for steps in (2, 3, 4, 8, 50)}
    assert all(run[-1] == pytest.approx(0.05) for run in runs.values())
    assert all(sum(run) / steps == pytest.approx(0.2) for steps, run in runs.items())
    assert front_loaded(0.2, 1).over(1) == [0.2]
    assert front_loaded(0.6, 2).over(2) == [1.0, pytest.approx(0.2)]


def test_dense_steps_come_on_top():
    shares = [share_of("front", 0.2, 2, Position(step, 10)) for step in range(10)]
    assert shares[:2] == [Share(1.0, True)] * 2
    assert [share.ratio for share in shares[2:]] == front_loaded(0.2, 10).over(10)[2:]
    assert mean_share("front", 0.2, 2, 10) > 0.3
    assert mean_share("constant", 0.2, 0.5, 10) == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        ("fast", "schedule='fast' is unknown"),
        (None, "schedule=None is unknown"),
        ({"power": 2}, "must have 'points'"),
        ({"points": []}, "points="),
        ({"points": [(0, 0.5), (0.5, 0)]}, "the point (0.5, 0)"),
        ({"points": [(0, 0.5), (0.5, 1.5)]}, "a ratio in (0, 1]"),
        ({"points": [(0, 0.5), (1.5, 0.5)]}, "a share of the run in [0, 1]"),
        ({"points": [(0.5, 0.5), (0.2, 0.5)]}, "must ascend"),
        ({"points": [(0, math.nan)]}, "the point"),
        ({"points": [(0, True)]}, "the point"),
        ({"points": "0.5"}, "points='0.5'"),
        ({"points": [(0, 0.5)], "power": 0}, "power=0"),
        ({"points": [(0, 0.5)], "power": math.inf}, "power=inf"),
    ],
)
def test_bad_schedules_are_refused(schedule, words):
    with pytest.raises(ValueError, match="schedule") as refused:
        VSAConfig(schedule=schedule)
    assert words in str(refused.value)


def test_two_ways_to_say_how_many_tiles_are_refused():
    with pytest.raises(ValueError, match=r"top_k=8 is constant, but schedule='front'"):
        VSAConfig(top_k=8, schedule="front")
    with pytest.raises(ValueError, match=r"top_k_ratio=0.2 and schedule=RatioSchedule.* both say"):
        VSAConfig(0.2, schedule=SQUARE)
    with pytest.raises(ValueError, match=r"schedule='front' contradicts schedule='constant'"):
        resolve_config(VSAConfig(schedule="constant"), {"schedule": "front"})


@pytest.mark.parametrize("form", FORMS)
def test_a_schedule_survives_its_json(form, tmp_path):
    config = VSAConfig(**FORMS[form])
    assert VSAConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    config.save_pretrained(tmp_path)
    assert VSAConfig.from_pretrained(tmp_path) == config
    values = config.to_dict()
    del values["schedule"]
    assert VSAConfig.from_dict({"top_k_ratio": 0.2}).schedule == "auto"


def test_patterns_have_schedules_of_their_own_and_later_ones_win():
    names = [f"blocks.{n}.attn1" for n in range(5)]
    config = {
        "default": {"schedule": {"points": [[0, 0.8], [1, 0.1]]}},
        "*": {},
        "blocks.1.*": {"top_k_ratio": 0.4},
        "blocks.2.*": {"top_k": 8},
        "blocks.3.*": {"schedule": "front", "top_k_ratio": 0.2},
        "blocks.4.*": {"top_k_ratio": 0.6, "schedule": "constant"},
    }
    resolved = module_configs(json.loads(json.dumps(config)), names, [])
    curve = RatioSchedule.ramp(0.8, 0.1)
    found = [(each.schedule, each.top_k, each.top_k_ratio) for each in resolved.values()]
    assert found == [(curve, None, 0.5), ("auto", None, 0.4), ("auto", 8, 0.5), ("front", None, 0.2),
                     ("constant", None, 0.6)]  # fmt: skip


def test_what_is_given_beside_a_config_takes_the_place_of_its_schedule():
    assert make_config(VSAConfig(schedule=SQUARE), {"top_k_ratio": 0.3}) == VSAConfig(0.3, schedule="constant")
    assert make_config(VSAConfig(0.2, schedule="front"), {"top_k_ratio": 0.3}) == VSAConfig(0.3, schedule="front")
    assert make_config(VSAConfig(0.2, schedule="front"), {"top_k": 3}) == VSAConfig(top_k=3, schedule="constant")
    assert make_config(VSAConfig(0.2), {"schedule": SQUARE}) == VSAConfig(schedule=SQUARE)
    assert make_config(VSAConfig(top_k=4), {"schedule": "front"}) == VSAConfig(schedule="front")


def test_a_schedule_takes_the_place_of_when_a_recipe_spends_tiles():
    curve = enabled_config(enable_vsa(WAN.build(), recipe="balanced", schedule=SQUARE))
    budget = enabled_config(enable_vsa(WAN.build(), recipe="balanced", schedule="front"))
    plain = enabled_config(enable_vsa(WAN.build(), recipe="balanced"))
    assert plain.dense_steps > 0
    assert curve == replace(plain, top_k_ratio=0.5, dense_steps=0, schedule=SQUARE)
    assert budget == replace(plain, dense_steps=0, schedule="front")


@pytest.mark.parametrize(("form", "said"), [("constant", ""), ("front", "schedule='front'"), ("square", "power=2.0")])
def test_messages_say_a_schedule_that_is_not_constant(form, said, caplog):
    with caplog.at_level(logging.INFO, "vsa_diffusers"):
        enable_vsa(WAN.build(), **FORMS[form])
    assert said in caplog.text
    assert ("schedule" in caplog.text) == (form != "constant")
    assert ("top_k_ratio" in caplog.text) == (form != "square")


@contextlib.contextmanager
def kept_by(*transformers):
    """Collects for every forward of these transformers the number of tiles kept, "dense" where it is."""
    seen, handles = [], []

    def note(attn, _):
        state = attn.processor.state
        seen.append("dense" if state.dense_step else state.kept)

    for transformer in transformers:
        attn = next(
            attn for attn in attention_modules(transformer).values() if isinstance(attn.processor, FamilyAttnProcessor)
        )
        handles.append(attn.register_forward_pre_hook(note))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def expected_of(form, steps, tiles=36):
    """What a run of so many steps keeps."""
    options = {"top_k_ratio": 0.5} | FORMS[form]
    shares = [share_of(options["schedule"], options["top_k_ratio"], 0, Position(step, steps)) for step in range(steps)]
    return ["dense" if share.is_dense else num_selected_tiles(tiles, share.ratio) for share in shares]


TILED = dict(block_size=(2, 1, 1))


def kept_of_a_call(pipe, **changes):
    with kept_by(pipe.transformer) as seen:
        call(pipe, **changes)
    return seen


@pytest.fixture(scope="module")
def pipe():
    return build()


def tiles_of(pipe):
    enable_vsa(pipe, 1.0, schedule="constant", **TILED)
    return kept_of_a_call(pipe, num_inference_steps=1)[0]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("steps", [1, 4, 9])
def test_every_form_is_followed_step_by_step(form, steps, pipe):
    tiles = tiles_of(pipe)
    enable_vsa(pipe, **TILED, **FORMS[form])
    assert kept_of_a_call(pipe, num_inference_steps=steps) == expected_of(form, steps, tiles)


@pytest.mark.parametrize("form", ["front", "points"])
def test_guidance_replaced_schedulers_and_pipelines_made_from_another_are_followed(form, pipe):
    tiles = tiles_of(pipe)
    enable_vsa(pipe, **TILED, **FORMS[form])
    expected = expected_of(form, 4, tiles)
    assert kept_of_a_call(pipe, guidance_scale=3.0) == [kept for kept in expected for _ in range(2)]
    second = diffusers.WanPipeline.from_pipe(pipe, scheduler=diffusers.FlowMatchEulerDiscreteScheduler())
    second.set_progress_bar_config(disable=True)
    assert kept_of_a_call(second) == expected
    twin = copy.deepcopy(second)
    del second
    gc.collect()
    assert kept_of_a_call(twin) == expected


@pytest.mark.parametrize("form", ["front", "points"])
@pytest.mark.parametrize(
    ("scheduler", "calls"), [(diffusers.FlowMatchHeunDiscreteScheduler, 2), (diffusers.HeunDiscreteScheduler, 2)]
)
def test_a_solver_that_calls_the_model_twice_a_step_keeps_the_same_twice(form, scheduler, calls):
    pipe = build(scheduler)
    tiles = tiles_of(pipe)
    enable_vsa(pipe, **TILED, **FORMS[form])
    expected = [kept for kept in expected_of(form, 4, tiles) for _ in range(calls)]
    assert kept_of_a_call(pipe) == expected[:-1]


@pytest.mark.parametrize("form", ["front", "points"])
def test_a_run_that_begins_in_the_middle_of_its_schedule_begins_at_the_front(form):
    pipe = build(cls="WanVideoToVideoPipeline")
    enable_vsa(pipe, 1.0, schedule="constant", **TILED)
    inputs = SIZE | FOUR | dict(num_inference_steps=6, strength=0.7) | embeddings()
    with kept_by(pipe.transformer) as seen:
        pipe(**inputs, video=video(5))
    enable_vsa(pipe, **TILED, **FORMS[form])
    expected = expected_of(form, 4, seen[0])
    with kept_by(pipe.transformer) as seen:
        pipe(**inputs, video=video(5))
    assert seen == expected


@pytest.mark.parametrize("form", ["front", "points"])
def test_two_experts_and_schedulers_without_a_counter_are_followed(form):
    pipe = build(parts=wan22())
    enable_vsa(pipe, 1.0, schedule="constant", **TILED)
    with kept_by(pipe.transformer, pipe.transformer_2) as seen:
        call(pipe, num_inference_steps=1)
    tiles = seen[0]
    enable_vsa(pipe, **TILED, **FORMS[form])
    with kept_by(pipe.transformer, pipe.transformer_2) as seen:
        call(pipe)
    assert seen == expected_of(form, 4, tiles)
    pipe, inputs = cogvideox()
    pipe.set_progress_bar_config(disable=True)
    inputs |= dict(num_inference_steps=4, output_type="latent")
    enable_vsa(pipe, 1.0, schedule="constant", **TILED)
    with kept_by(pipe.transformer) as seen:
        pipe(**inputs)
    tiles = seen[0]
    enable_vsa(pipe, **TILED, **FORMS[form])
    with kept_by(pipe.transformer) as seen:
        pipe(**inputs)
    assert seen == expected_of(form, 4, tiles)


def test_the_stages_of_a_pyramid_spend_one_budget():
    pipe, inputs = helios_pyramid()
    pipe.set_progress_bar_config(disable=True)
    inputs |= dict(pyramid_num_inference_steps_list=[1, 2, 1], guidance_scale=1.0, output_type="latent")
    enable_vsa(pipe, schedule=RatioSchedule([(0.0, 1.0), (0.5, 1.0), (0.5, 0.2)]), **TILED)
    with kept_by(pipe.transformer) as seen:
        pipe(**inputs)
    assert [kept == "dense" for kept in seen[:4]] == [True, True, False, False]


def test_diffusion_forcing_which_copies_its_scheduler_is_followed():
    pipe = build(cls="SkyReelsV2DiffusionForcingPipeline", parts=wan(SKYREELS))
    enable_vsa(pipe, schedule=RatioSchedule([(0.0, 1.0), (0.3, 1.0), (0.3, 0.2)]), **TILED)
    with kept_by(pipe.transformer) as seen:
        pipe(**embeddings(), **SIZE | dict(num_frames=17) | FOUR | FORCING | FORCING_INPUTS[""]())
    dense = [kept == "dense" for kept in seen]
    assert dense[0]
    assert not dense[len(dense) // 2]
    assert not dense[-1]


def test_dense_steps_beside_a_budget_are_dense_and_told(pipe, caplog):
    tiles = tiles_of(pipe)
    with caplog.at_level(logging.INFO, "vsa_diffusers"):
        enable_vsa(pipe, 0.3, schedule="front", dense_steps=1, **TILED)
    assert "dense_steps=1 come on top of top_k_ratio=0.3: over 50 steps 0.31 of the tiles" in caplog.text
    assert kept_of_a_call(pipe) == ["dense", *expected_of("front", 4, tiles)[1:]]


def test_set_top_k_ratio_sets_the_mean_of_a_budget_and_ends_a_curve(pipe):
    tiles = tiles_of(pipe)
    enable_vsa(pipe, 0.9, schedule="front", **TILED)
    set_top_k_ratio(pipe, 0.3)
    assert kept_of_a_call(pipe) == expected_of("front", 4, tiles)
    assert enabled_config(pipe.transformer) == VSAConfig(0.3, schedule="front", **TILED)
    enable_vsa(pipe, schedule=SQUARE, **TILED)
    set_top_k_ratio(pipe, 0.3)
    assert kept_of_a_call(pipe) == [num_selected_tiles(tiles, 0.3)] * 4
    assert enabled_config(pipe.transformer) == VSAConfig(0.3, schedule="constant", **TILED)


def test_a_budget_of_all_tiles_is_dense_at_every_step_and_a_constant_one_runs_sparse(pipe):
    tiles = tiles_of(pipe)
    enable_vsa(pipe, 1.0, schedule="front", **TILED)
    assert kept_of_a_call(pipe) == ["dense"] * 4
    enable_vsa(pipe, 1.0, schedule="constant", **TILED)
    assert kept_of_a_call(pipe) == [tiles] * 4


@pytest.mark.parametrize(
    ("form", "told"),
    [("constant", []), ("front", []), ("square", ["the schedule cannot be followed"]),
     ("points", ["the schedule cannot be followed"])],
)  # fmt: skip
def test_without_a_run_every_form_is_its_mean_and_only_a_curve_warns_once(form, told, caplog):
    options = {"top_k_ratio": 0.5} | FORMS[form]
    mean = options["top_k_ratio"] if isinstance(options["schedule"], str) else options["schedule"].mean
    model = enable_vsa(WAN.build(), **FORMS[form], block_size=(1, 2, 2))
    constant = enable_vsa(WAN.build(), mean, schedule="constant", block_size=(1, 2, 2))
    with caplog.at_level(logging.WARNING, "vsa_diffusers"):
        for _ in range(3):
            assert run(model, WAN, GRID).equal(run(constant, WAN, GRID))
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == len(told)
    assert all(words in warning for words, warning in zip(told, warnings, strict=True))


def test_a_schedule_makes_one_compiled_graph_and_one_for_dense_steps():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    model = enable_vsa(WAN.build(), schedule=RatioSchedule.ramp(0.9, 0.05, 2), block_size=(1, 2, 2))
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    graphs = []
    timesteps = list(range(12))
    for i, t in enumerate(timesteps):  # noqa: B007 - read by the transformer's hooks
        run(compiled, WAN, GRID)
        graphs.append(counter.frame_count)
    assert graphs[-1] <= 2
    enable_vsa(model, schedule=RatioSchedule.ramp(1.0, 0.05, 2), block_size=(1, 2, 2))
    for i, t in enumerate(timesteps):  # noqa: B007
        run(compiled, WAN, GRID)
    assert counter.frame_count <= graphs[-1] + 2


@pytest.mark.parametrize("default", ["constant", "front"])
def test_the_default_is_one_line_and_leaves_gates_counts_and_processors_constant(default, monkeypatch):
    monkeypatch.setattr("vsa_diffusers.processor.AUTO", default)
    model = WAN.build()
    add_gate_compress(model)
    torch.nn.init.ones_(model.blocks[1].attn1.to_gate_compress.bias)

    def schedules():
        return [block.attn1.processor.config.schedule for block in model.blocks]

    enable_vsa(model, 0.3)
    assert schedules() == [default, "constant"]
    torch.nn.init.ones_(model.blocks[0].attn1.to_gate_compress.bias)
    run(model, WAN, GRID)
    assert schedules() == ["constant", "constant"]
    enable_vsa(model, combine="merge", top_k=3)
    assert schedules() == ["constant", "constant"]
    model.set_attn_processor(VSAAttnProcessor.for_transformer(model, combine="merge", top_k_ratio=0.3))
    assert schedules() == ["constant", "constant"]


def test_one_processor_for_all_refuses_a_schedule_and_processors_for_each_follow_it():
    with pytest.raises(ValueError, match="VSAAttnProcessor cannot serve schedule"):
        VSAAttnProcessor(top_k_ratio=0.3, schedule="front")
    pipe = build()
    tiles = tiles_of(pipe)
    processors = VSAAttnProcessor.for_transformer(pipe.transformer, **FORMS["points"], **TILED)
    pipe.transformer.set_attn_processor(processors)
    assert kept_of_a_call(pipe) == expected_of("points", 4, tiles)


def test_the_mean_of_a_budget_set_by_a_callback_is_told_once(caplog):
    pipe = enable_vsa(build(), 0.3, **TILED)

    def callback(pipe, step, timestep, kwargs):
        set_top_k_ratio(pipe, 0.5)
        return kwargs

    set_top_k_ratio(pipe, 0.4)
    assert "within a run" not in caplog.text
    call(pipe, callback_on_step_end=callback)
    assert caplog.text.count("set_top_k_ratio(0.5) within a run sets the mean of its budget") == 1
    enable_vsa(pipe, 0.3, schedule="constant", **TILED)
    caplog.clear()
    call(pipe, callback_on_step_end=callback)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_file_from_before_there_were_schedules_means_a_constant_ratio(tmp_path):
    VSAConfig(0.2, combine="merge").save_pretrained(tmp_path)
    path = tmp_path / "vsa_config.json"
    values = json.loads(path.read_text())
    assert VSAConfig.from_file(path).schedule == values.pop("schedule") == "auto"
    path.write_text(json.dumps(values))
    assert VSAConfig.from_file(path).schedule == "constant"
    path.write_text('{"top_k_ratio": 0.2}')  # by hand: what it leaves out is the default
    assert VSAConfig.from_file(path).schedule == "auto"
