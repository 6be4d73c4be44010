"""`dense_steps`: the first of the user's steps, in whatever way a pipeline counts them."""

import contextlib
import copy
import gc
import logging

import diffusers
import pytest
import torch
from wan_runs import FORCING_INPUTS, FOUR, build, call

from positions import recorded_positions
from tiny_models import RECIPES, run
from tiny_pipelines_context import helios_pyramid
from tiny_pipelines_joint import cogvideox, consisid
from tiny_pipelines_video import FORCING, SIZE, SKYREELS, embeddings, video, wan, wan22
from vsa_diffusers import enable_vsa, set_top_k_ratio
from vsa_diffusers.models import attention_modules
from vsa_diffusers.processor import FamilyAttnProcessor
from vsa_diffusers.steps import Position, position_in_run

WAN = RECIPES[0]


@contextlib.contextmanager
def dense_calls(*transformers):
    """Collects, for every forward of these transformers, whether it ran dense."""
    seen, handles = [], []
    for transformer in transformers:
        attn = next(
            attn for attn in attention_modules(transformer).values() if isinstance(attn.processor, FamilyAttnProcessor)
        )
        handles.append(attn.register_forward_pre_hook(lambda attn, _: seen.append(attn.processor.state.dense_step)))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def dense_of_a_call(pipe, **changes):
    with dense_calls(pipe.transformer) as seen:
        call(pipe, **changes)
    return seen


@pytest.mark.parametrize(("dense_steps", "expected"), [(0, 0), (2, 2), (0.25, 1), (0.3, 2), (1.0, 4), (99, 4)])
def test_the_first_steps_are_dense(dense_steps, expected):
    assert dense_of_a_call(enable_vsa(build(), 0.3, dense_steps=dense_steps)) == [n < expected for n in range(4)]


def test_guidance_in_two_calls_counts_as_one_step():
    pipe = enable_vsa(build(), 0.3, dense_steps=1)
    assert dense_of_a_call(pipe, guidance_scale=3.0) == [True, True, *[False] * 6]


@pytest.mark.parametrize("order", ["the first pipeline has not run", "it has run", "it is gone"])
def test_a_pipeline_made_from_another_counts_its_own_steps(order):
    first = enable_vsa(build(), 0.25, dense_steps=2)
    second = diffusers.WanPipeline.from_pipe(first, scheduler=diffusers.UniPCMultistepScheduler())
    second.set_progress_bar_config(disable=True)
    if order == "it has run":
        call(first)
    if order == "it is gone":
        del first
        gc.collect()
    assert dense_of_a_call(second) == [True, True, False, False]


@pytest.mark.parametrize("gone", [False, True])
def test_a_copied_pipeline_counts_its_own_steps(gone):
    pipe = enable_vsa(build(), 0.25, dense_steps=2)
    twin = copy.deepcopy(pipe)
    if gone:
        del pipe
        gc.collect()
    assert dense_of_a_call(twin) == [True, True, False, False]


def test_a_replaced_scheduler_is_counted():
    pipe = enable_vsa(build(), 0.25, dense_steps=2)
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    assert dense_of_a_call(pipe) == [True, True, False, False]


def test_a_run_that_begins_in_the_middle_of_its_schedule_has_its_first_steps_dense():
    pipe = enable_vsa(build(cls="WanVideoToVideoPipeline"), 0.25, dense_steps=2)
    inputs = SIZE | FOUR | dict(num_inference_steps=6, strength=0.7) | embeddings()
    with dense_calls(pipe.transformer) as seen:
        pipe(**inputs, video=video(5))
    assert seen == [True, True, False, False]


@pytest.mark.parametrize("task", FORCING_INPUTS)
def test_diffusion_forcing_which_copies_its_scheduler_has_its_first_steps_dense(task):
    pipe = build(cls=f"SkyReelsV2DiffusionForcing{task}Pipeline", parts=wan(SKYREELS))
    enable_vsa(pipe, 0.25, dense_steps=2)
    with dense_calls(pipe.transformer) as seen, recorded_positions(pipe) as positions:
        pipe(**embeddings(), **SIZE | dict(num_frames=17) | FOUR | FORCING | FORCING_INPUTS[task]())
    per_run = positions[0].total
    assert seen[:per_run] == [step < 2 for step in range(per_run)]
    assert [position.step for position in positions[:per_run]] == list(range(per_run))


@pytest.mark.parametrize("case", [cogvideox, consisid])
def test_schedulers_without_a_counter_are_served(case):
    pipe, inputs = case()
    pipe.set_progress_bar_config(disable=True)
    assert not hasattr(pipe.scheduler, "step_index")
    enable_vsa(pipe, 0.25, dense_steps=2)
    with dense_calls(pipe.transformer) as seen:
        pipe(**inputs | dict(num_inference_steps=4, output_type="latent"))
    assert seen == [True, True, False, False]


@pytest.mark.parametrize(
    "scheduler", [diffusers.FlowMatchHeunDiscreteScheduler, diffusers.HeunDiscreteScheduler], ids=lambda c: c.__name__
)
def test_a_solver_that_calls_the_model_twice_a_step_counts_the_users_steps(scheduler):
    pipe = enable_vsa(build(scheduler), 0.25, dense_steps=2)
    with recorded_positions(pipe) as positions:
        seen = dense_of_a_call(pipe)
    assert [position.step for position in positions] == [0, 0, 1, 1, 2, 2, 3]
    assert {position.total for position in positions} == {4}
    assert seen == [True] * 4 + [False] * 3


def test_the_stages_of_a_pyramid_are_one_run():
    pipe, inputs = helios_pyramid()
    pipe.set_progress_bar_config(disable=True)
    inputs |= dict(pyramid_num_inference_steps_list=[1, 2, 1], guidance_scale=1.0, output_type="latent")
    with recorded_positions(pipe) as positions:
        pipe(**inputs)
    chunk = [Position(step, 4) for step in range(4)]
    assert positions == chunk * (len(positions) // 4)
    assert len(positions) >= 4


def test_two_experts_share_one_run():
    pipe = enable_vsa(build(parts=wan22()), 0.25, dense_steps=3)
    with dense_calls(pipe.transformer, pipe.transformer_2) as seen:
        call(pipe)
    assert seen == [True, True, True, False]


def test_an_interrupted_run_is_forgotten():
    pipe = enable_vsa(build(), 0.25, dense_steps=2)

    def interrupt(pipe, step, timestep, kwargs):
        pipe._interrupt = True
        return kwargs

    assert dense_of_a_call(pipe, callback_on_step_end=interrupt) == [True]
    assert dense_of_a_call(pipe) == [True, True, False, False]


def test_a_callback_may_change_the_ratio():
    def callback(pipe, step, timestep, kwargs):
        set_top_k_ratio(pipe, (1.0, 0.5, 0.25, 0.25)[step])
        return kwargs

    pipe, kept = enable_vsa(build(), 0.25, block_size=(2, 1, 1), schedule="constant"), []
    attn = pipe.transformer.blocks[0].attn1
    attn.register_forward_pre_hook(lambda attn, _: kept.append(attn.processor.state.kept))
    call(pipe, callback_on_step_end=callback)
    tiles = kept[1]
    assert kept == [tiles // 4, tiles, tiles // 2, tiles // 4]


def test_a_pipeline_with_other_dense_steps_on_the_same_transformer_is_refused():
    first = enable_vsa(build(), 0.25, dense_steps=2)
    second = diffusers.WanPipeline.from_pipe(first)
    with pytest.raises(ValueError, match=r"dense_steps=1, but VSA was enabled .* another pipeline with dense_steps=2"):
        enable_vsa(second, 0.25, dense_steps=1)
    assert dense_of_a_call(first) == [True, True, False, False]
    assert dense_of_a_call(enable_vsa(first, 0.25, dense_steps=1)) == [True, False, False, False]


def test_what_another_pipeline_changes_on_a_shared_transformer_is_told(caplog):
    first = enable_vsa(build(), 0.25)
    enable_vsa(first, 0.3)
    assert "other pipeline" not in caplog.text
    enable_vsa(diffusers.WanPipeline.from_pipe(first), 0.5)
    assert "VSA changes for the other pipeline" in caplog.text


def test_an_unknown_step_is_told_once_and_runs_sparse(caplog):
    model = enable_vsa(WAN.build(), 0.3, dense_steps=2)
    sparse = enable_vsa(WAN.build(), 0.3)
    with caplog.at_level(logging.WARNING, "vsa_diffusers"):
        outputs = [run(model, WAN, (5, 10, 12)) for _ in range(3)]
    assert outputs[0].equal(run(sparse, WAN, (5, 10, 12)))
    [line] = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert "dense_steps cannot be counted" in line


def test_a_loop_of_ones_own_is_counted():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(3)
    seen = []
    for i, t in enumerate(scheduler.timesteps):  # noqa: B007
        seen.append(position_in_run())
    assert seen == [Position(step, 3) for step in range(3)]


def test_a_loop_that_counts_something_else_is_not_taken_for_denoising():
    timesteps, t = torch.rand(4), torch.rand(4)
    seen = []
    for i in range(4):  # noqa: B007
        seen.append(position_in_run())
    assert seen == [None] * 4
    assert len(timesteps) == len(t)


@pytest.mark.parametrize(("steps", "total", "expected"), [(0.1, 30, 3), (0.1, 31, 4), (3, 30, 3), (0.0, 30, 0)])
def test_shares_of_the_steps_are_rounded_up(steps, total, expected):
    assert sum(Position(step, total).is_among_first(steps) for step in range(total)) == expected


def test_patterns_may_have_dense_steps_of_their_own_and_beside_them():
    own = dict(top_k_ratio=0.3)
    pipe = enable_vsa(build(), config={"blocks.0.attn1": own | dict(dense_steps=1), "blocks.1.attn1": own})
    attn = [block.attn1 for block in pipe.transformer.blocks[:2]]
    seen = [[], []]
    for each, list_ in zip(attn, seen, strict=True):
        each.register_forward_pre_hook(lambda attn, _, list_=list_: list_.append(attn.processor.state.dense_step))
    call(pipe)
    enable_vsa(pipe, config={"*": dict(top_k_ratio=0.3)}, dense_steps=2)
    call(pipe)
    assert seen == [[True, False, False, False, True, True, False, False], [False] * 4 + [True, True, False, False]]
