"""What `inspect_attention` measures: against direct formulas in fp64, and over whole pipelines of several families."""

import json
import math
from dataclasses import replace

import pytest
import torch

from oracle import SCORES, tile_numbers
from tiny_fine_tuned import fine_tuned
from tiny_pipelines_context import ltx2_in_context
from tiny_pipelines_joint import cogvideox, hunyuan_video, motif_video
from tiny_text_pipeline import tiny_pipeline
from vsa_diffusers import VSAConfig, disable_vsa, enable_vsa
from vsa_diffusers.inspection import (
    CURVE_RATIOS,
    Inspection,
    Layer,
    figures,
    inspect_attention,
    mass,
    observed_attention,
)
from vsa_diffusers.inspection.observation import dense_output, measure, tile_of
from vsa_diffusers.pipeline import enabled_config, sparse_processors
from vsa_diffusers.problem import Problem
from vsa_diffusers.schedule import RatioSchedule
from vsa_diffusers.tiles import TileGrid

CALL = dict(prompt="a red ring", height=64, width=64, num_frames=9, num_inference_steps=2, max_sequence_length=16)
BLOCKS = VSAConfig(0.25, block_size=(2, 2, 2))


@pytest.fixture(scope="module")
def pipe():
    torch.manual_seed(0)
    pipe = tiny_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def inspection(pipe):
    return inspect_attention(pipe, config=BLOCKS, guidance_scale=3.0, **CALL)


def random_call(combine="sparse", selection="mean"):
    """A call in fp64 with partial tiles, text on both sides, and padding in it."""
    generator = torch.Generator().manual_seed(3)
    problem = Problem(TileGrid((3, 5, 6), (2, 2, 4)), 4, combine, 0.7, 2, 3, selection)
    shape = 2, problem.grid.num_tokens + 5, 3, 8
    query, key, value = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    mask = torch.tensor([[True, True, True, False, False], [True, False, True, True, True]])
    gate = torch.randn(shape, generator=generator, dtype=torch.float64) if combine == "gate" else None
    return query, key, value, gate, mask, problem


def direct_mass(query, key, mask, problem):
    """`[batch, heads, query tiles, key tiles + 1]` by one dense softmax."""
    tile = tile_numbers(problem.grid.video_shape, problem.grid.block_size)
    logits = problem.scale * torch.einsum("bqhd,bkhd->bhqk", query[:, problem.video], key)
    column = torch.cat([torch.full((2,), tile.max() + 1), tile, torch.full((3,), tile.max() + 1)])
    valid = torch.ones(query.shape[:2], dtype=torch.bool)
    valid[:, column > tile.max()] = mask
    weights = logits.masked_fill(~valid[:, None, None], -math.inf).softmax(-1)
    member = torch.nn.functional.one_hot(tile).double()
    return (member / member.sum(0)).T @ weights @ torch.nn.functional.one_hot(column).double()


@pytest.mark.parametrize("selection", ["mean", "quarters"])
def test_numbers_agree_with_one_dense_softmax_in_fp64(selection):
    query, key, value, gate, mask, problem = random_call(selection=selection)
    tiles, count = torch.arange(problem.grid.num_tiles), problem.grid.num_tiles
    dense = dense_output(query, key, value, gate, mask, problem, "torch")
    found = measure(query, key, value, gate, mask, problem, "torch", tiles, 5, dense)

    of_all = direct_mass(query, key, mask, problem)
    of_tiles, context = of_all[..., :-1], of_all[..., -1]
    grid = problem.grid.video_shape, problem.grid.block_size
    order = SCORES[selection](query, key, *grid, problem.scale, problem.before).argsort(-1, descending=True)
    held = of_tiles.gather(-1, order)[..., : problem.top_k].sum(-1) + context
    best = of_tiles.sort(-1, descending=True).values
    assert found["mass"] == pytest.approx(held.mean().item(), abs=1e-12)
    assert found["mass_of_heads"] == pytest.approx(held.mean((0, 2)).tolist(), abs=1e-12)
    assert found["context_mass"] == pytest.approx(context.mean().item(), abs=1e-12)
    assert found["best_mass"] == pytest.approx((best[..., : problem.top_k].sum(-1) + context).mean().item(), abs=1e-12)
    needed = ((best.cumsum(-1) + context[..., None]) < 0.9).sum(-1) + 1
    assert found["needed"] == pytest.approx(needed.clamp_max(count).double().mean().item() / count, abs=1e-12)
    kept = torch.zeros_like(of_tiles).scatter_(-1, order[..., : problem.top_k], 1.0)
    torch.testing.assert_close(found["query"].kept, kept[:, :, 5].mean((0, 1)))
    torch.testing.assert_close(found["query"].mass, of_tiles[:, :, 5].mean((0, 1)))
    assert found["curve"][-1] == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("combine", ["sparse", "merge", "gate"])
def test_the_error_is_that_of_the_output_against_every_tile_kept(combine):
    from vsa_diffusers import video_sparse_attention

    query, key, value, gate, mask, problem = random_call(combine)
    tiles = torch.arange(3)
    dense = dense_output(query, key, value, gate, mask, problem, "torch")
    found = measure(query, key, value, gate, mask, problem, "torch", tiles, None, dense)
    form = dict(
        block_size=problem.grid.block_size, gate=gate, combine=combine, scale=problem.scale, context_tokens=(2, 3),
        context_mask=mask, selection=problem.selection, implementation="torch",
    )  # fmt: skip
    sparse, whole = (
        video_sparse_attention(query, key, value, problem.grid.video_shape, top_k=count, **form)
        for count in (problem.top_k, problem.grid.num_tiles)
    )
    video = problem.video
    expected = (sparse - whole)[:, video].norm() / whole[:, video].norm()
    assert found["error"] == pytest.approx(expected.item(), rel=1e-9)
    assert found["error"] > 0.01
    torch.testing.assert_close(dense, whole, atol=1e-12, rtol=1e-12)


def test_mass_does_not_depend_on_how_much_is_held_at_once(monkeypatch):
    query, key, _, _, mask, problem = random_call()
    tiles = torch.tensor([0, 3, 4])
    expected = mass.tile_mass(query, key, problem, tiles, mask)
    monkeypatch.setattr(mass, "MAX_BYTES", 1)
    torch.testing.assert_close(mass.tile_mass(query, key, problem, tiles, mask), expected)
    torch.testing.assert_close(expected.sum(-1), torch.ones(expected.shape[:-1], dtype=torch.float64))


def test_at_ratio_one_all_mass_is_held_and_nothing_is_wrong(pipe):
    inspection = inspect_attention(pipe, ratio=1.0, config=BLOCKS, output_type="latent", **CALL)
    assert inspection.table("mass").min() == pytest.approx(1, abs=1e-5)
    assert inspection.table("error").max() < 1e-5
    assert inspection.dense_layers == []


def test_it_measures_every_layer_step_and_guidance_pass(inspection):
    places = [(each.layer.position, each.step, each.run) for each in inspection.observations]
    assert sorted(places) == [(layer, step, run) for layer in (0, 1) for step in (0, 1) for run in (0, 1)]
    assert inspection.table("mass").shape == (2, 2)
    assert inspection.frames.shape == (9, 64, 64, 3)


def test_more_tiles_hold_more_mass_and_the_best_ones_most(inspection):
    for each in inspection.observations:
        assert sorted(each.curve) == list(each.curve)
        assert all(ours <= best + 1e-6 for ours, best in zip(each.curve, each.best_curve, strict=True))
        assert each.mass == pytest.approx(each.curve[CURVE_RATIOS.index(0.25)], abs=1e-5)
        assert 0 < each.needed <= each.needed_by_selection <= 1


def test_the_video_it_makes_is_the_dense_one(pipe, inspection):
    call = CALL | dict(generator=torch.Generator().manual_seed(0), guidance_scale=3.0, output_type="np")
    dense = pipe(**call).frames[0]
    assert abs(inspection.frames / 255 - dense).max() < 0.02


@pytest.mark.parametrize(
    "case", [cogvideox, hunyuan_video, motif_video, ltx2_in_context], ids=lambda case: case.__name__
)
def test_it_serves_families_with_text_or_references_in_the_attention(case):
    torch.manual_seed(0)
    pipe, call = case()
    pipe.set_progress_bar_config(disable=True)
    call = call | dict(output_type="latent", generator=torch.Generator().manual_seed(0))
    inspection = inspect_attention(pipe, ratio=1.0, **call)
    assert inspection.table("mass").min() == pytest.approx(1, abs=1e-5)
    assert inspection.table("error").max() < 1e-3
    assert inspection.by_layer("context_mass")[0] > 0.01


def test_chosen_layers_and_steps_alone_are_measured(pipe):
    call = CALL | dict(num_inference_steps=3, output_type="latent")
    some = inspect_attention(pipe, config=BLOCKS, layers=[-1], steps=[0, -1], query=(1, 3, 0), query_tiles=2, **call)
    assert some.steps == [0, 2]
    assert [layer.name for layer in some.layers] == ["blocks.1.attn1"]
    grid = some.observations[0].grid
    assert {each.query.tile for each in some.observations} == {tile_of((1, 3, 0), grid)}
    assert inspect_attention(pipe, config=BLOCKS, steps=2, **call).steps == [0, 2]


def test_what_was_enabled_stays_and_lends_its_settings(pipe):
    enable_vsa(pipe, 0.5, block_size=(1, 2, 2), dense_layers=(0,), dense_steps=1)
    try:
        before, config = sparse_processors(pipe.transformer), enabled_config(pipe.transformer)
        inspection = inspect_attention(pipe, output_type="latent", **CALL)
        assert inspection.config == replace(config, dense_layers=(), dense_steps=0, schedule="constant")
        assert len(inspection.layers) == 2
        with pytest.raises(ValueError, match="query"):
            inspect_attention(pipe, query=(99, 0, 0), **CALL)
        after = sparse_processors(pipe.transformer)
        assert enabled_config(pipe.transformer) == config
        assert list(after.values()) == list(before.values())
        assert all(pipe.transformer.get_submodule(name).processor is each for name, each in after.items())
    finally:
        disable_vsa(pipe)


def test_a_schedule_is_set_aside_and_one_without_a_mean_wants_a_ratio(pipe):
    front = VSAConfig(0.5, block_size=(1, 2, 2), schedule="front")
    inspection = inspect_attention(pipe, config=front, output_type="latent", **CALL)
    assert {each.kept for each in inspection.observations} == {6}
    falling = VSAConfig(block_size=(1, 2, 2), schedule=RatioSchedule([(0, 0.8), (1, 0.1)]))
    with pytest.raises(ValueError, match="pass the ratio to inspect"):
        inspect_attention(pipe, config=falling, **CALL)
    inspection = inspect_attention(pipe, ratio=0.25, config=falling, output_type="latent", **CALL)
    assert {each.kept for each in inspection.observations} == {3}


def test_nothing_stays_where_nothing_was_enabled(pipe, inspection):
    with pytest.raises(ValueError, match="not enabled"):
        enabled_config(pipe.transformer)


def test_trained_gates_are_compared_with_every_tile_kept():
    pipe = tiny_pipeline()
    pipe.set_progress_bar_config(disable=True)
    disable_vsa(fine_tuned(pipe.transformer))
    config = VSAConfig(1.0, block_size=(2, 2, 2))
    whole = inspect_attention(pipe, config=config, output_type="latent", **CALL)
    assert whole.table("error").max() < 1e-5
    some = inspect_attention(pipe, ratio=0.25, config=config, output_type="latent", **CALL)
    assert some.table("error").min() > 1e-4


def test_a_transformer_by_itself_is_measured_without_a_denoising_loop(pipe):
    inputs = dict(
        hidden_states=torch.randn(1, 4, 3, 8, 8), timestep=torch.tensor([500]),
        encoder_hidden_states=torch.randn(1, 4, 16),
    )  # fmt: skip
    with observed_attention(pipe.transformer, config=BLOCKS) as inspection, torch.no_grad():
        pipe.transformer(**inputs)
        pipe.transformer(**inputs)
    assert [(each.step, each.run) for each in inspection.observations] == [(0, 0), (0, 0), (0, 1), (0, 1)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(steps=0), "steps=0 must be step numbers"),
        (dict(steps=[5]), "the run has 2 steps, 0 to 1"),
        (dict(steps=[]), "steps=[] must be step numbers"),
        (dict(layers=[2]), "transformer has 2 video self-attention layers, 0 to 1"),
        (dict(query=(0, 0)), "query=(0, 0) must be a token (t, h, w)"),
        (dict(query=(3, 0, 0)), "not on the video's grid of (3, 4, 4) tokens"),
        (dict(query_tiles=0), "query_tiles=0 must be a whole number"),
        (dict(ratio=0), "top_k_ratio=0"),
    ],
)
def test_wrong_arguments_are_refused_by_name(pipe, arguments, message):
    with pytest.raises(ValueError) as refused:
        inspect_attention(pipe, config=BLOCKS, **arguments, **CALL)
    assert message in str(refused.value)


def test_a_transformer_is_no_pipeline(pipe):
    with pytest.raises(TypeError, match="observed_attention"):
        inspect_attention(pipe.transformer)


@pytest.mark.parametrize("compile_it", [lambda x: x.compile(), lambda x: x.blocks[1].compile()])
def test_compiled_modules_are_refused(compile_it):
    pipe = tiny_pipeline()
    compile_it(pipe.transformer)
    with pytest.raises(ValueError, match="compiled"):
        inspect_attention(pipe, **CALL)


def test_a_compiled_transformer_in_a_pipeline_is_refused():
    pipe = tiny_pipeline()
    pipe.transformer = torch.compile(pipe.transformer)
    with pytest.raises(ValueError, match="compiled"):
        inspect_attention(pipe, **CALL)


def made_up(inspection, errors):
    """The same, with layers of these errors in the second step."""
    first = inspection.observations[0]
    observations = [
        replace(first, layer=Layer("transformer", f"blocks.{position}.attn1", position), step=step, error=error * step)
        for position, error in enumerate(errors)
        for step in (0, 1)
    ]
    return Inspection(observations, inspection.config, inspection.query_tiles)


def test_a_layer_far_worse_than_the_others_asks_to_stay_dense(inspection):
    found = made_up(inspection, [0.31, 0.2, 0.16, 0.2, 0.29])
    assert [layer.position for layer in found.dense_layers] == [0]
    assert found.threshold == pytest.approx(0.3)
    assert found.advice == "Layer 0 asks to stay dense: pass dense_layers=(0,)."
    assert made_up(inspection, [0.01, 0.02, 0.045, 0.01]).dense_layers == []


def test_where_every_layer_is_bad_more_tiles_are_advised(inspection):
    found = made_up(inspection, [0.4, 0.5, 0.45])
    assert found.dense_layers == []
    assert "keep more tiles" in found.advice


def test_it_is_written_as_json_without_nan(inspection):
    found = json.loads(json.dumps(inspection.to_dict(), allow_nan=False))
    assert [layer["name"] for layer in found["layers"]] == ["blocks.0.attn1", "blocks.1.attn1"]
    assert found["dense"]["threshold"] == inspection.threshold
    assert len(found["observations"]) == 8
    assert found["call"]["num_frames"] == 9


def test_a_notebook_shows_a_drawing_without_pyplot(inspection):
    shown = figures.draw_curves(inspection)._repr_png_()
    assert shown.startswith(b"\x89PNG")


def test_a_title_is_not_cut_off_where_the_video_has_few_frames(inspection, monkeypatch):
    monkeypatch.setattr(figures, "MOST_FRAMES", 1)
    figure = figures.draw_query(inspection)
    figure.draw_without_rendering()
    title = figure._suptitle.get_window_extent()
    assert 0 <= title.x0 < title.x1 <= figure.bbox.width
