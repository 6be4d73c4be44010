"""Whole calls of the pipelines with joint attention or extra tokens: exact at ratio 1, sparse below, undone after."""

import importlib
import logging
from dataclasses import replace

import diffusers
import pytest
import torch
from diffusers.pipelines.ltx2 import LTX2TextConnectors
from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition
from diffusers.pipelines.ltx2.pipeline_ltx2_ic_lora import LTX2ReferenceCondition
from PIL import Image
from transformers import BatchEncoding, SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

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


def ltx2_parts():
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLLTX2Video(
        latent_channels=8, block_out_channels=(8,), decoder_block_out_channels=(8,), layers_per_block=(1,),
        decoder_layers_per_block=(1, 1), spatio_temporal_scaling=(True,), decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False), downsample_type=("spatial",), upsample_residual=(False,),
        upsample_factor=(1,), patch_size=1, patch_size_t=1,
    )  # fmt: skip
    audio_vae = diffusers.AutoencoderKLLTX2Audio(
        base_channels=8, ch_mult=(1,), num_res_blocks=1, attn_resolutions=None, resolution=32, latent_channels=2,
        mid_block_add_attention=False, mel_bins=16,
    )  # fmt: skip
    connectors = LTX2TextConnectors(
        caption_channels=16, text_proj_in_factor=1, video_connector_num_attention_heads=2,
        video_connector_attention_head_dim=8, video_connector_num_layers=1,
        video_connector_num_learnable_registers=None, audio_connector_num_attention_heads=2,
        audio_connector_attention_head_dim=8, audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=None, connector_rope_base_seq_len=32,
    )  # fmt: skip
    return dict(
        transformer=transformer("ltx2.3"), vae=vae, audio_vae=audio_vae, connectors=connectors,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), text_encoder=None, tokenizer=None, vocoder=None,
    )  # fmt: skip


def ltx2_prompt():
    """Guided in every way, so that calls have different batch sizes; a keyframe beside the first frame."""
    mask = torch.ones(1, 6, dtype=torch.long)
    return dict(
        prompt_embeds=torch.randn(1, 6, 16), prompt_attention_mask=mask, negative_prompt_embeds=torch.randn(1, 6, 16),
        negative_prompt_attention_mask=mask, height=32, width=32, num_frames=5, num_inference_steps=1,
        spatio_temporal_guidance_blocks=[1],
        conditions=[LTX2VideoCondition(frames=IMAGE, index=index, crf=0) for index in (0, 3)],
    )  # fmt: skip


def ltx2_condition():
    return diffusers.LTX2ConditionPipeline(**ltx2_parts()), ltx2_prompt()


def ltx2_in_context():
    """An in-context reference without a mask of its own."""
    reference = LTX2ReferenceCondition(frames=VIDEO[:2])
    return diffusers.LTX2InContextPipeline(**ltx2_parts()), ltx2_prompt() | dict(reference_conditions=[reference])


def motif_parts(**rest):
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLWan(base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
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
    return diffusers.MotifVideoPipeline(**motif_parts()), motif_prompt()


def motif_video_image():
    pipe = diffusers.MotifVideoImage2VideoPipeline(**motif_parts(feature_extractor=None))
    return pipe, motif_prompt() | dict(image=IMAGE, prompt=None)


class Tokenizer:
    """As much of a tokenizer as Cosmos 3 asks for: one token per word."""

    eos_token_id = 1

    def convert_tokens_to_ids(self, token):
        return 2

    def apply_chat_template(self, conversations, **_):
        return BatchEncoding(
            {"input_ids": [3 + len(word) for each in conversations for word in each["content"].split()]}
        )


def cosmos3():
    torch.manual_seed(0)
    model = transformer("cosmos3", latent_channel=16, patch_latent_dim=64, vocab_size=40)
    vae = diffusers.AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    pipe = diffusers.Cosmos3OmniPipeline(
        transformer=model, text_tokenizer=Tokenizer(), vae=vae, scheduler=diffusers.UniPCMultistepScheduler(),
        enable_safety_checker=False,
    )  # fmt: skip
    return pipe, dict(
        prompt="A small boat", image=IMAGE, height=96, width=96, num_frames=17, num_inference_steps=2,
        use_system_prompt=False,
    )  # fmt: skip


CASES = [
    hunyuan_video, hunyuan_video_concat, hunyuan_video_replace, hunyuan_skyreels, framepack, hunyuan_video15,
    hunyuan_video15_image, cogvideox, cogvideox15_image, cogvideox_video, cogvideox_control, consisid, mochi,
    easyanimate, easyanimate_inpaint, ltx_condition, ltx_long, helios, helios_pyramid, ltx2_condition,
    ltx2_in_context, motif_video, motif_video_image, cosmos3,
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
