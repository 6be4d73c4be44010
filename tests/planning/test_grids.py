"""The planned grid is the one that each family's pipeline hands to its transformer; nothing is denoised."""

import inspect
from dataclasses import replace

import diffusers
import pytest
import torch

from tiny_models_video import ANIMATE
from tiny_pipelines_context import cosmos3, helios
from tiny_pipelines_joint import (
    cogvideox,
    cogvideox15_image,
    consisid,
    easyanimate,
    framepack,
    hunyuan_video,
    hunyuan_video15,
    mochi,
    motif_video,
    transformer,
)
from tiny_pipelines_video import (
    CALL,
    SIZE,
    SKYREELS,
    SMALL,
    TEXT,
    TINY,
    WAN16,
    WAN_IMAGE,
    PipelineRecipe,
    allegro,
    cosmos1,
    cosmos25,
    embeddings,
    flow_map,
    image_and_text,
    kandinsky5,
    kandinsky5_embeddings,
    kandinsky6,
    kandinsky6_embeddings,
    ltx,
    ltx2,
    ltx2_embeddings,
    masked_embeddings,
    video,
    wan,
)
from vsa_diffusers.models import find_family, known_families
from vsa_diffusers.pipeline import supported_parts
from vsa_diffusers.planning.advice import grid_of
from vsa_diffusers.planning.latents import latent_extents, token_grid
from vsa_diffusers.planning.models import compression
from vsa_diffusers.planning.published import PUBLISHED

PIPELINES = [
    PipelineRecipe("WanPipeline", wan(), lambda: TEXT | embeddings()),
    PipelineRecipe(
        "WanVACEPipeline", wan("WanVACETransformer3DModel", WAN16 | dict(vace_layers=[0], vace_in_channels=96)),
        lambda: TEXT | embeddings() | dict(video=video()),
    ),
    PipelineRecipe(
        "WanAnimatePipeline",
        wan("WanAnimateTransformer3DModel", ANIMATE | dict(in_channels=36, latent_channels=16, out_channels=16)),
        lambda: SIZE | CALL | image_and_text() | dict(
            pose_video=video(), face_video=video(), segment_frame_length=17, prev_segment_conditioning_frames=1
        ),
    ),
    PipelineRecipe("SkyReelsV2Pipeline", wan(SKYREELS), lambda: TEXT | embeddings() | dict(num_frames=20)),
    PipelineRecipe(
        "ChronoEditPipeline", wan("ChronoEditTransformer3DModel", WAN_IMAGE),
        lambda: TEXT | image_and_text() | dict(enable_temporal_reasoning=True, num_temporal_reasoning_steps=1),
    ),
    PipelineRecipe("CosmosTextToWorldPipeline", cosmos1, lambda: TEXT | embeddings()),
    PipelineRecipe("Cosmos2_5_PredictBasePipeline", cosmos25(), lambda: TEXT | embeddings()),
    PipelineRecipe(
        "AllegroPipeline", allegro, lambda: TEXT | masked_embeddings() | dict(num_frames=20, negative_prompt=None)
    ),
    PipelineRecipe(
        "AnyFlowPipeline", wan("AnyFlowTransformer3DModel", scheduler=flow_map), lambda: TEXT | embeddings()
    ),
    PipelineRecipe("Kandinsky5T2VPipeline", kandinsky5(), lambda: TEXT | kandinsky5_embeddings()),
    PipelineRecipe("Kandinsky6TI2VAPipeline", kandinsky6, lambda: TEXT | kandinsky6_embeddings()),
    PipelineRecipe("LTXPipeline", ltx, lambda: TEXT | SMALL | masked_embeddings()),
    PipelineRecipe("LTX2Pipeline", ltx2, lambda: TEXT | TINY | ltx2_embeddings()),
]  # fmt: skip
OTHERS = [hunyuan_video, framepack, hunyuan_video15, cogvideox, cogvideox15_image, consisid, mochi, easyanimate,
          motif_video, helios, cosmos3]  # fmt: skip
# What the tiny calls set otherwise than planning assumes: latent frames at a time.
WINDOWS = {"HunyuanVideo Framepack": 3, "Helios": 3}
FRAMES = "num_frames"


class FirstForwardError(Exception):
    """Ends a call as soon as the grid is known."""


def grid_at_run_time(pipe, call):
    """What the family reads from the transformer's first forward."""
    [model] = supported_parts(pipe).values()
    family = find_family(model)

    def look(module, args, kwargs):
        inputs = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
        raise FirstForwardError(family.grid(module, inputs)[0])

    handle = model.register_forward_pre_hook(look, with_kwargs=True)
    with pytest.raises(FirstForwardError) as ended:
        call()
    handle.remove()
    return model, family, ended.value.args[0]


def planned(model, family, pipe, size, monkeypatch):
    """The grid that planning comes to for the same model and VAE."""
    window = WINDOWS.get(family.name)
    if window:
        monkeypatch.setattr("vsa_diffusers.planning.latents.WINDOW", window)
    published = next(row.vae for row in PUBLISHED if row.transformer == type(model).__name__)
    vae = compression({"_class_name": type(pipe.vae).__name__, **pipe.vae.config}) or published
    latents = latent_extents(family, model.config, size, vae)
    return token_grid(family, model.config, latents)


@pytest.mark.parametrize("recipe", [each for each in PIPELINES if each.is_available()], ids=lambda each: each.cls)
def test_a_pipeline_of_video_tokens_has_the_planned_grid(recipe, monkeypatch):
    pipe, arguments = recipe.build(), recipe.arguments()
    model, family, grid = grid_at_run_time(pipe, lambda: pipe(**arguments))
    frames = arguments.get(FRAMES) or arguments["segment_frame_length"]
    size = (arguments["height"], arguments["width"], frames)
    assert planned(model, family, pipe, size, monkeypatch) == grid


@pytest.mark.parametrize("case", OTHERS, ids=lambda case: case.__name__)
def test_a_pipeline_of_joint_attention_has_the_planned_grid(case, monkeypatch):
    pipe, arguments = case()
    pipe.set_progress_bar_config(disable=True)
    model, family, grid = grid_at_run_time(pipe, lambda: pipe(**arguments, output_type="latent"))
    size = (arguments["height"], arguments["width"], arguments[FRAMES])
    assert planned(model, family, pipe, size, monkeypatch) == grid


def test_the_blocks_of_minimax_h3_have_the_planned_grid(monkeypatch):
    module = pytest.importorskip(
        "diffusers.modular_pipelines.minimax_h3.modular_blocks_minimax_h3",
        reason="runs with a diffusers that has MiniMax-H3's blocks; constraints.txt names one",
    )
    pipe = module.MiniMaxH3CoreDenoiseStep().init_pipeline()
    schedulers = {name: diffusers.MiniMaxH3Scheduler() for name in ("scheduler", "audio_scheduler")}
    pipe.update_components(**schedulers, transformer=transformer("minimax-h3", in_channels=24, audio_in_channels=32))
    inputs = dict(prompt_embeds=torch.ones(1, 7, 16), text_token_tags=torch.ones(7, dtype=torch.long), height=128,
                  width=160, num_frames=130, num_inference_steps=2)  # fmt: skip
    model, family, grid = grid_at_run_time(pipe, lambda: pipe(**inputs))
    latents = latent_extents(family, model.config, (128, 160, 130), (4, 16))
    assert token_grid(family, model.config, latents) == grid


def test_every_family_is_among_these_pipelines():
    built = {"MiniMax-H3"}
    for recipe in PIPELINES:
        if recipe.is_available():
            built |= {find_family(part).name for part in supported_parts(recipe.build()).values()}
    built |= {"HunyuanVideo", "HunyuanVideo Framepack", "HunyuanVideo 1.5", "CogVideoX", "Mochi", "EasyAnimate",
              "Motif-Video", "Helios", "Cosmos 3"}  # fmt: skip
    assert {family.name for family in known_families()} <= built


@pytest.fixture
def ltx_2(models):
    return models["ltx2"]


@pytest.mark.parametrize(
    ("size", "grid"), [((512, 768, 121), (16, 16, 24)), ((384, 384, 49), (7, 12, 12)), ((256, 256, 25), (4, 8, 8))]
)
def test_the_sizes_of_ltx_2_have_these_grids(ltx_2, size, grid):
    assert grid_of(ltx_2, size)[1] == grid


def test_a_config_without_what_the_family_reads_is_an_error(ltx_2):
    family = replace(ltx_2.costs.family, read_grid=lambda transformer, inputs: None)
    with pytest.raises(ValueError, match="latents of 16x16x24 make no grid of tokens for LTX-2"):
        token_grid(family, ltx_2.config, (16, 16, 24))
