"""Whole calls of the pipelines with joint attention or extra tokens: exact at ratio 1, sparse below, undone after."""

import importlib
import logging
from dataclasses import replace

import diffusers
import pytest
import torch
from PIL import Image
from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

from oracle import relative_error
from tiny_models import RECIPES
from vsa_diffusers import disable_vsa, enable_vsa

SIZE = dict(height=128, width=128, num_frames=17, num_inference_steps=2)
SMALL = dict(height=96, width=96)
IMAGE = Image.effect_mandelbrot((128, 128), (-2, -1.5, 1, 1.5), 50).convert("RGB")
VIDEO = [IMAGE.rotate(5 * angle) for angle in range(9)]


def transformer(recipe, **config):
    """The tiny transformer of a recipe in tiny_models, with some constructor arguments changed."""
    found = next(each for each in RECIPES if each.name == recipe)
    return replace(found, config=found.config | config).build()


def hunyuan_parts():
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0)
    return dict(vae=vae, scheduler=scheduler) | dict.fromkeys(
        ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    )


def hunyuan_prompt(prefix=""):
    mask = torch.tensor([[1] * 5 + [0] * 4])
    return {
        f"{prefix}prompt_embeds": torch.randn(1, 9, 16),
        f"{prefix}pooled_prompt_embeds": torch.randn(1, 8),
        f"{prefix}prompt_attention_mask": mask,
    }


def hunyuan_video():
    pipe = diffusers.HunyuanVideoPipeline(transformer=transformer("hunyuan-video"), **hunyuan_parts())
    return pipe, SIZE | hunyuan_prompt() | hunyuan_prompt("negative_") | dict(true_cfg_scale=3.0)


def hunyuan_video_concat():
    pipe = diffusers.HunyuanVideoImageToVideoPipeline(
        transformer=transformer("hunyuan-video-concat"), image_processor=None, **hunyuan_parts()
    )
    return pipe, SIZE | hunyuan_prompt() | dict(image=IMAGE)


def hunyuan_video_replace():
    pipe = diffusers.HunyuanVideoImageToVideoPipeline(
        transformer=transformer("hunyuan-video-replace"), image_processor=None, **hunyuan_parts()
    )
    return pipe, SIZE | hunyuan_prompt() | dict(image=IMAGE)


def hunyuan_skyreels():
    pipe = diffusers.HunyuanSkyreelsImageToVideoPipeline(
        transformer=transformer("hunyuan-video", in_channels=8), **hunyuan_parts()
    )
    return pipe, SIZE | hunyuan_prompt() | hunyuan_prompt("negative_") | dict(image=IMAGE)


def image_encoder():
    torch.manual_seed(0)
    config = SiglipVisionConfig(
        hidden_size=20, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=30, patch_size=10
    )
    return dict(
        image_encoder=SiglipVisionModel(config).eval(),
        feature_extractor=SiglipImageProcessor(size={"height": 30, "width": 30}),
    )


def framepack():
    pipe = diffusers.HunyuanVideoFramepackPipeline(
        transformer=transformer("framepack"), **image_encoder(), **hunyuan_parts()
    )
    return pipe, SIZE | hunyuan_prompt() | dict(image=IMAGE, latent_window_size=3)


def hunyuan_video15_parts():
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=4, block_out_channels=(16, 16), layers_per_block=1, spatial_compression_ratio=4,
        temporal_compression_ratio=2, downsample_match_channel=False, upsample_match_channel=False,
    )  # fmt: skip
    return dict(
        vae=vae.eval(), scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        guider=diffusers.ClassifierFreeGuidance(guidance_scale=3.0),
    ) | dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))  # fmt: skip


def hunyuan_video15_prompt():
    prompt = {}
    for prefix in ("", "negative_"):
        prompt |= {
            f"{prefix}prompt_embeds": torch.randn(1, 9, 16),
            f"{prefix}prompt_embeds_mask": torch.tensor([[1] * 5 + [0] * 4]),
            f"{prefix}prompt_embeds_2": torch.randn(1, 6, 12),
            f"{prefix}prompt_embeds_mask_2": torch.tensor([[1] * 3 + [0] * 3]),
        }
    return prompt | dict(num_frames=9, num_inference_steps=2)


def hunyuan_video15():
    pipe = diffusers.HunyuanVideo15Pipeline(
        transformer=transformer("hunyuan-video-1.5", target_size=32), **hunyuan_video15_parts()
    )
    return pipe, hunyuan_video15_prompt() | dict(height=32, width=40)


def hunyuan_video15_image():
    pipe = diffusers.HunyuanVideo15ImageToVideoPipeline(
        transformer=transformer("hunyuan-video-1.5", target_size=32), **image_encoder(), **hunyuan_video15_parts()
    )
    return pipe, hunyuan_video15_prompt() | dict(image=IMAGE)


def cogvideox_parts():
    torch.manual_seed(0)
    stages = 4
    vae = diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * stages, up_block_types=("CogVideoXUpBlock3D",) * stages,
        block_out_channels=(8,) * stages, latent_channels=4, layers_per_block=1, norm_num_groups=2,
        temporal_compression_ratio=4,
    )  # fmt: skip
    return dict(vae=vae, scheduler=diffusers.CogVideoXDDIMScheduler(), text_encoder=None, tokenizer=None)


def cogvideox_prompt():
    return SIZE | dict(prompt_embeds=torch.randn(1, 9, 16), negative_prompt_embeds=torch.randn(1, 9, 16))


def cogvideox():
    return diffusers.CogVideoXPipeline(
        transformer=transformer("cogvideox-5b"), **cogvideox_parts()
    ), cogvideox_prompt()  # fmt: skip


def cogvideox15_image():
    model = transformer("cogvideox-1.5", sample_width=16, sample_height=16)
    pipe = diffusers.CogVideoXImageToVideoPipeline(transformer=model, **cogvideox_parts())
    return pipe, cogvideox_prompt() | dict(image=IMAGE, num_frames=29)


def cogvideox_video():
    pipe = diffusers.CogVideoXVideoToVideoPipeline(transformer=transformer("cogvideox-2b"), **cogvideox_parts())
    inputs = cogvideox_prompt() | SMALL | dict(video=VIDEO)
    del inputs["num_frames"]
    return pipe, inputs


def cogvideox_control():
    pipe = diffusers.CogVideoXFunControlPipeline(
        transformer=transformer("cogvideox-5b", in_channels=8), **cogvideox_parts()
    )
    inputs = cogvideox_prompt() | SMALL | dict(control_video=VIDEO)
    del inputs["num_frames"]
    return pipe, inputs


def consisid():
    # The pipeline needs OpenCV only to draw key points, but diffusers hides it where OpenCV is missing.
    module = importlib.import_module("diffusers.pipelines.consisid.pipeline_consisid")
    pipe = module.ConsisIDPipeline(transformer=transformer("consisid"), **cogvideox_parts())
    face = dict(id_cond=torch.randn(1, 2), id_vit_hidden=[torch.randn(1, 2, 2)])
    return pipe, cogvideox_prompt() | face | dict(image=IMAGE)


def mochi():
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLMochi(
        latent_channels=4, encoder_block_out_channels=(32,) * 4, decoder_block_out_channels=(32,) * 4,
        layers_per_block=(1,) * 5,
    )  # fmt: skip
    pipe = diffusers.MochiPipeline(
        transformer=transformer("mochi"), vae=vae, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        text_encoder=None, tokenizer=None,
    )  # fmt: skip
    return pipe, SIZE | dict(
        prompt_embeds=torch.randn(1, 9, 16), prompt_attention_mask=torch.tensor([[1] * 5 + [0] * 4]).bool(),
        negative_prompt_embeds=torch.zeros(1, 9, 16), negative_prompt_attention_mask=torch.zeros(1, 9).bool(),
        num_frames=25,
    )  # fmt: skip


def easyanimate_parts():
    torch.manual_seed(0)
    stages = 3
    vae = diffusers.AutoencoderKLMagvit(
        down_block_types=("SpatialDownBlock3D",) + ("SpatialTemporalDownBlock3D",) * stages,
        up_block_types=("SpatialUpBlock3D",) + ("SpatialTemporalUpBlock3D",) * stages,
        block_out_channels=(8,) * (stages + 1), latent_channels=4, layers_per_block=1, norm_num_groups=2,
        spatial_group_norm=False,
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return dict(vae=vae, scheduler=scheduler, text_encoder=None, tokenizer=None)


def easyanimate_prompt():
    mask = torch.ones(1, 9)
    return SIZE | dict(
        prompt_embeds=torch.randn(1, 9, 16), prompt_attention_mask=mask,
        negative_prompt_embeds=torch.randn(1, 9, 16), negative_prompt_attention_mask=mask,
    )  # fmt: skip


def video_tensor():
    return torch.rand(1, 3, 17, 128, 128)


def easyanimate():
    pipe = diffusers.EasyAnimatePipeline(transformer=transformer("easyanimate", in_channels=4), **easyanimate_parts())
    return pipe, easyanimate_prompt()


def easyanimate_inpaint():
    pipe = diffusers.EasyAnimateInpaintPipeline(
        transformer=transformer("easyanimate", in_channels=9), **easyanimate_parts()
    )
    return pipe, easyanimate_prompt() | dict(video=video_tensor(), mask_video=torch.ones(1, 1, 17, 128, 128) * 255)


def ltx_parts():
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4, layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5, spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False), decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4, upsample_factor=(1,) * 4, timestep_conditioning=False, patch_size=1,
        patch_size_t=1, encoder_causal=True, decoder_causal=False,
    )  # fmt: skip
    return dict(
        vae=vae, transformer=transformer("ltx"), scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        text_encoder=None, tokenizer=None,
    )  # fmt: skip


def ltx_prompt():
    mask = torch.tensor([[1] * 4 + [0] * 2])
    return dict(
        prompt_embeds=torch.randn(1, 6, 16), prompt_attention_mask=mask, negative_prompt_embeds=torch.randn(1, 6, 16),
        negative_prompt_attention_mask=mask, height=32, width=32, num_frames=17, num_inference_steps=2,
    )  # fmt: skip


def ltx_condition():
    pipe = diffusers.LTXConditionPipeline(**ltx_parts())
    conditions = dict(image=[torch.rand(1, 3, 32, 32), torch.rand(1, 3, 32, 32)], frame_index=[0, 8])
    return pipe, ltx_prompt() | conditions


def ltx_long():
    """Two windows with an overlap: the second one has the tail of the first after its own frames."""
    parts = ltx_parts() | dict(scheduler=diffusers.LTXEulerAncestralRFScheduler())
    pipe = diffusers.LTXI2VLongMultiPromptPipeline(**parts)
    embeds, mask = torch.randn(1, 6, 16), torch.tensor([[1] * 4 + [0] * 2])
    pipe.encode_prompt = lambda **_: (embeds, mask, embeds, mask)
    return pipe, dict(
        prompt="a|b", height=32, width=32, num_frames=25, num_inference_steps=2, temporal_tile_size=16,
        temporal_overlap=8, cond_image=IMAGE, skip_steps_sigma_threshold=None,
    )  # fmt: skip


def helios_parts(scheduler):
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    return dict(
        transformer=transformer("helios", in_channels=16, out_channels=16), vae=vae, scheduler=scheduler,
        text_encoder=None, tokenizer=None,
    )  # fmt: skip


def helios_prompt():
    """Two chunks, so that the second one has a history."""
    return dict(
        prompt_embeds=torch.randn(1, 9, 16), negative_prompt_embeds=torch.randn(1, 9, 16), height=128, width=128,
        num_frames=20, history_sizes=[4, 2, 1], num_latent_frames_per_chunk=3,
    )  # fmt: skip


def helios():
    pipe = diffusers.HeliosPipeline(
        **helios_parts(diffusers.HeliosScheduler(stages=1, stage_range=[0, 1], gamma=1 / 3))
    )
    return pipe, helios_prompt() | SMALL | dict(num_inference_steps=1, image=IMAGE)


def helios_pyramid():
    """Three stages, each on a grid of its own."""
    pipe = diffusers.HeliosPyramidPipeline(**helios_parts(diffusers.HeliosScheduler(gamma=0.3)))
    return pipe, helios_prompt() | dict(pyramid_num_inference_steps_list=[1, 1, 1])


CASES = [
    hunyuan_video, hunyuan_video_concat, hunyuan_video_replace, hunyuan_skyreels, framepack, hunyuan_video15,
    hunyuan_video15_image, cogvideox, cogvideox15_image, cogvideox_video, cogvideox_control, consisid, mochi,
    easyanimate, easyanimate_inpaint, ltx_condition, ltx_long, helios, helios_pyramid,
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_a_whole_call(case, caplog):
    torch.manual_seed(0)
    pipe, inputs = case()
    pipe.set_progress_bar_config(disable=True)

    def call():
        output = pipe(**inputs, output_type="latent", generator=torch.Generator().manual_seed(0), return_dict=False)[0]
        return torch.cat([part.flatten() for part in output])

    dense = call()
    enable_vsa(pipe, 1.0)
    torch.testing.assert_close(call(), dense, atol=1e-3, rtol=1e-3)
    enable_vsa(pipe, 0.3)
    with caplog.at_level(logging.INFO, "vsa_diffusers"):
        sparse = call()
    assert torch.isfinite(sparse).all()
    assert relative_error(sparse, dense) > 1e-5
    assert "runs dense" not in caplog.text
    disable_vsa(pipe)
    assert call().equal(dense)
