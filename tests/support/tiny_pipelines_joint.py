"""Tiny pipelines in which video and text share one attention, each with the arguments of a call."""

import importlib
from dataclasses import replace

import diffusers
import pytest
import torch
from PIL import Image
from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

from tiny_models import RECIPES, diffusers_class

SIZE = dict(height=128, width=128, num_frames=17, num_inference_steps=2)
SMALL = dict(height=96, width=96)
IMAGE = Image.effect_mandelbrot((128, 128), (-2, -1.5, 1, 1.5), 50).convert("RGB")
VIDEO = [IMAGE.rotate(5 * angle) for angle in range(9)]


def pipeline(name):
    """A pipeline class of diffusers."""
    return diffusers_class(name) or pytest.skip(f"runs with a diffusers that has {name}; constraints.txt names one")


def transformer(recipe, **config):
    """The tiny transformer of a recipe in tiny_models, with some constructor arguments changed."""
    found = next((each for each in RECIPES if each.name == recipe), None) or pytest.skip(
        f"runs with a diffusers that has what {recipe} needs; constraints.txt names one"
    )
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
    pipe = pipeline("HunyuanVideoPipeline")(transformer=transformer("hunyuan-video"), **hunyuan_parts())
    return pipe, SIZE | hunyuan_prompt() | hunyuan_prompt("negative_") | dict(true_cfg_scale=3.0)


def hunyuan_video_concat():
    pipe = pipeline("HunyuanVideoImageToVideoPipeline")(
        transformer=transformer("hunyuan-video-concat"), image_processor=None, **hunyuan_parts()
    )
    return pipe, SIZE | hunyuan_prompt() | dict(image=IMAGE)


def hunyuan_video_replace():
    pipe = pipeline("HunyuanVideoImageToVideoPipeline")(
        transformer=transformer("hunyuan-video-replace"), image_processor=None, **hunyuan_parts()
    )
    return pipe, SIZE | hunyuan_prompt() | dict(image=IMAGE)


def hunyuan_skyreels():
    pipe = pipeline("HunyuanSkyreelsImageToVideoPipeline")(
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
    pipe = pipeline("HunyuanVideoFramepackPipeline")(
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
    pipe = pipeline("HunyuanVideo15Pipeline")(
        transformer=transformer("hunyuan-video-1.5", target_size=32), **hunyuan_video15_parts()
    )
    return pipe, hunyuan_video15_prompt() | dict(height=32, width=40)


def hunyuan_video15_image():
    pipe = pipeline("HunyuanVideo15ImageToVideoPipeline")(
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
    return pipeline("CogVideoXPipeline")(
        transformer=transformer("cogvideox-5b"), **cogvideox_parts()
    ), cogvideox_prompt()  # fmt: skip


def cogvideox15_image():
    model = transformer("cogvideox-1.5", sample_width=16, sample_height=16)
    pipe = pipeline("CogVideoXImageToVideoPipeline")(transformer=model, **cogvideox_parts())
    return pipe, cogvideox_prompt() | dict(image=IMAGE, num_frames=29)


def cogvideox_video():
    pipe = pipeline("CogVideoXVideoToVideoPipeline")(transformer=transformer("cogvideox-2b"), **cogvideox_parts())
    inputs = cogvideox_prompt() | SMALL | dict(video=VIDEO)
    del inputs["num_frames"]
    return pipe, inputs


def cogvideox_control():
    pipe = pipeline("CogVideoXFunControlPipeline")(
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
    pipe = pipeline("MochiPipeline")(
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
    pipe = pipeline("EasyAnimatePipeline")(transformer=transformer("easyanimate", in_channels=4), **easyanimate_parts())
    return pipe, easyanimate_prompt()


def easyanimate_inpaint():
    pipe = pipeline("EasyAnimateInpaintPipeline")(
        transformer=transformer("easyanimate", in_channels=9), **easyanimate_parts()
    )
    return pipe, easyanimate_prompt() | dict(video=video_tensor(), mask_video=torch.ones(1, 1, 17, 128, 128) * 255)


def motif_parts(**rest):
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLWan(base_dim=2, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4)  # fmt: skip
    return dict(
        transformer=transformer("motif-video"), vae=vae, guider=diffusers.ClassifierFreeGuidance(guidance_scale=3.0),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), text_encoder=None, tokenizer=None,
    ) | rest  # fmt: skip


def motif_prompt():
    mask = torch.tensor([[1] * 5 + [0] * 4])
    return dict(
        prompt_embeds=torch.randn(1, 9, 16), prompt_attention_mask=mask, negative_prompt_embeds=torch.randn(1, 9, 16),
        negative_prompt_attention_mask=mask, height=96, width=96, num_frames=17, num_inference_steps=2,
    )  # fmt: skip


def motif_video():
    return pipeline("MotifVideoPipeline")(**motif_parts()), motif_prompt()


def motif_video_image():
    pipe = pipeline("MotifVideoImage2VideoPipeline")(**motif_parts(feature_extractor=None))
    return pipe, motif_prompt() | dict(image=IMAGE, prompt=None)


JOINT_PIPELINES = [
    hunyuan_video,
    hunyuan_video_concat,
    hunyuan_video_replace,
    hunyuan_skyreels,
    framepack,
    hunyuan_video15,
    hunyuan_video15_image,
    cogvideox,
    cogvideox15_image,
    cogvideox_video,
    cogvideox_control,
    consisid,
    mochi,
    easyanimate,
    easyanimate_inpaint,
    motif_video,
    motif_video_image,
]
