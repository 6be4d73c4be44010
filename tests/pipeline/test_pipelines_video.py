"""Whole pipeline calls: dense, exact at ratio 1, sparse below."""

import logging

import pytest
import torch

from oracle import relative_error
from positions import assert_all_steps_are_known, recorded_positions
from tiny_models_video import ANIMATE
from tiny_pipelines_video import (
    CALL,
    FORCING,
    PICTURE,
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
    cosmos1_video,
    cosmos2,
    cosmos25,
    cosmos25_transfer,
    embeddings,
    flow_map,
    image,
    image_and_text,
    kandinsky5,
    kandinsky5_embeddings,
    kandinsky5_picture,
    kandinsky6,
    kandinsky6_embeddings,
    ltx,
    ltx2,
    ltx2_embeddings,
    masked_embeddings,
    video,
    wan,
    wan22,
)
from vsa_diffusers import disable_vsa, enable_vsa

PIPELINES = [
    PipelineRecipe("WanPipeline", wan(), lambda: TEXT | embeddings()),
    PipelineRecipe("WanPipeline", wan22(), lambda: TEXT | embeddings(), name="WanPipeline-2.2"),
    PipelineRecipe("WanImageToVideoPipeline", wan(config=WAN_IMAGE), lambda: TEXT | image_and_text()),
    PipelineRecipe(
        "WanImageToVideoPipeline", wan22(WAN16 | dict(in_channels=36)),
        lambda: TEXT | embeddings() | dict(image=image()),
        name="WanImageToVideoPipeline-2.2",
    ),
    PipelineRecipe("WanVideoToVideoPipeline", wan(), lambda: SIZE | CALL | embeddings() | dict(video=video())),
    PipelineRecipe(
        "WanVACEPipeline",
        wan("WanVACETransformer3DModel", WAN16 | dict(vace_layers=[0, 1], vace_in_channels=96)),
        lambda: TEXT | embeddings() | dict(video=video(), reference_images=[image()]),
    ),
    PipelineRecipe(
        "WanAnimatePipeline",
        wan("WanAnimateTransformer3DModel", ANIMATE | dict(in_channels=36, latent_channels=16, out_channels=16)),
        lambda: SIZE | CALL | image_and_text() | dict(
            pose_video=video(), face_video=video(), segment_frame_length=17, prev_segment_conditioning_frames=1
        ),
    ),
    PipelineRecipe(
        "LucyEditPipeline", wan(config=WAN16 | dict(in_channels=32)),
        lambda: TEXT | embeddings() | dict(video=video()),
    ),
    PipelineRecipe("SkyReelsV2Pipeline", wan(SKYREELS), lambda: TEXT | embeddings()),
    PipelineRecipe(
        "SkyReelsV2ImageToVideoPipeline", wan(SKYREELS, WAN_IMAGE), lambda: TEXT | image_and_text()
    ),
    PipelineRecipe(
        "SkyReelsV2DiffusionForcingPipeline", wan(SKYREELS), lambda: TEXT | embeddings() | FORCING
    ),
    PipelineRecipe(
        "SkyReelsV2DiffusionForcingImageToVideoPipeline", wan(SKYREELS),
        lambda: TEXT | embeddings() | FORCING | dict(image=image()),
    ),
    PipelineRecipe(
        "SkyReelsV2DiffusionForcingVideoToVideoPipeline", wan(SKYREELS),
        lambda: TEXT | embeddings() | FORCING | dict(video=video(5), overlap_history=5, num_frames=21),
    ),
    PipelineRecipe(
        "ChronoEditPipeline", wan("ChronoEditTransformer3DModel", WAN_IMAGE),
        lambda: TEXT | image_and_text() | dict(enable_temporal_reasoning=True, num_temporal_reasoning_steps=1),
    ),
    PipelineRecipe("CosmosTextToWorldPipeline", cosmos1, lambda: TEXT | embeddings()),
    PipelineRecipe(
        "CosmosVideoToWorldPipeline", cosmos1_video, lambda: TEXT | embeddings() | dict(image=image())
    ),
    PipelineRecipe("Cosmos2TextToImagePipeline", cosmos2(in_channels=16), lambda: PICTURE | embeddings()),
    PipelineRecipe("Cosmos2VideoToWorldPipeline", cosmos2(), lambda: TEXT | embeddings() | dict(image=image())),
    PipelineRecipe("Cosmos2_5_PredictBasePipeline", cosmos25(), lambda: TEXT | embeddings()),
    PipelineRecipe(
        "Cosmos2_5_TransferPipeline", cosmos25_transfer,
        lambda: TEXT | embeddings() | dict(controls=video(), num_frames_per_chunk=17),
    ),
    PipelineRecipe(
        "AllegroPipeline", allegro, lambda: TEXT | masked_embeddings() | dict(num_frames=20, negative_prompt=None)
    ),
    PipelineRecipe(
        "AnyFlowPipeline",
        wan("AnyFlowTransformer3DModel", scheduler=flow_map),
        lambda: TEXT | embeddings(),
    ),
    PipelineRecipe("Kandinsky5T2VPipeline", kandinsky5(), lambda: TEXT | kandinsky5_embeddings()),
    PipelineRecipe(
        "Kandinsky5I2VPipeline", kandinsky5(image=True), lambda: TEXT | kandinsky5_embeddings() | dict(image=image())
    ),
    PipelineRecipe("Kandinsky5T2IPipeline", kandinsky5_picture(), lambda: PICTURE | kandinsky5_embeddings()),
    PipelineRecipe(
        "Kandinsky5I2IPipeline", kandinsky5_picture(image=True),
        lambda: PICTURE | kandinsky5_embeddings() | dict(image=image()),
    ),
    PipelineRecipe("Kandinsky6TI2VAPipeline", kandinsky6, lambda: TEXT | kandinsky6_embeddings()),
    PipelineRecipe(
        "Kandinsky6TI2VAPipeline", kandinsky6, lambda: TEXT | kandinsky6_embeddings() | dict(image=image()),
        name="Kandinsky6TI2VAPipeline-image",
    ),
    PipelineRecipe("LTXPipeline", ltx, lambda: TEXT | SMALL | masked_embeddings()),
    PipelineRecipe("LTXImageToVideoPipeline", ltx, lambda: TEXT | SMALL | masked_embeddings() | dict(image=image())),
    PipelineRecipe("LTX2Pipeline", ltx2, lambda: TEXT | TINY | ltx2_embeddings()),
    PipelineRecipe(
        "LTX2ImageToVideoPipeline", ltx2,
        lambda: TEXT | TINY | ltx2_embeddings() | dict(image=image(), image_crf=0),
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    "recipe",
    [recipe for recipe in PIPELINES if recipe.is_available()],
    ids=lambda recipe: recipe.name or recipe.cls,
)
def test_a_whole_call_is_exact_at_ratio_one_and_sparse_below(recipe, caplog):
    pipe = recipe.build()
    dense = recipe.run(pipe)
    assert recipe.run(pipe).equal(dense)
    with caplog.at_level(logging.INFO, "vsa_diffusers"):
        with recorded_positions(pipe) as positions:
            exact = recipe.run(enable_vsa(pipe, 1.0))
        sparse = recipe.run(enable_vsa(pipe, 0.3, block_size=(4, 4, 4)))
    assert relative_error(exact, dense) < 1e-3
    assert torch.isfinite(sparse).all()
    assert relative_error(sparse, dense) > 10 * relative_error(exact, dense)
    assert "runs dense" not in caplog.text
    assert_all_steps_are_known(positions)
    assert recipe.run(disable_vsa(pipe)).equal(dense)
