"""Tiny pipelines with other tokens beside the video's, each with the arguments of a call."""

import diffusers
import pytest
import torch
from transformers import BatchEncoding

from tiny_pipelines_joint import IMAGE, SMALL, VIDEO, pipeline, transformer


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
    pipe = pipeline("LTXConditionPipeline")(**ltx_parts())
    conditions = dict(image=[torch.rand(1, 3, 32, 32), torch.rand(1, 3, 32, 32)], frame_index=[0, 8])
    return pipe, ltx_prompt() | conditions


def ltx_long():
    """Two windows with an overlap: the second one has the tail of the first after its own frames."""
    parts = ltx_parts() | dict(scheduler=diffusers.LTXEulerAncestralRFScheduler())
    pipe = pipeline("LTXI2VLongMultiPromptPipeline")(**parts)
    embeds, mask = torch.randn(1, 6, 16), torch.tensor([[1] * 4 + [0] * 2])
    pipe.encode_prompt = lambda **_: (embeds, mask, embeds, mask)
    return pipe, dict(
        prompt="a|b", height=32, width=32, num_frames=25, num_inference_steps=2, temporal_tile_size=16,
        temporal_overlap=8, cond_image=IMAGE, skip_steps_sigma_threshold=None,
    )  # fmt: skip


def helios_parts(scheduler):
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLWan(base_dim=2, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
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
    pipe = pipeline("HeliosPipeline")(
        **helios_parts(diffusers.HeliosScheduler(stages=1, stage_range=[0, 1], gamma=1 / 3))
    )
    return pipe, helios_prompt() | SMALL | dict(num_inference_steps=1, image=IMAGE)


def helios_pyramid():
    """Three stages, each on a grid of its own."""
    pipe = pipeline("HeliosPyramidPipeline")(**helios_parts(diffusers.HeliosScheduler(gamma=0.3)))
    return pipe, helios_prompt() | dict(pyramid_num_inference_steps_list=[1, 1, 1])


def ltx2_module(name=""):
    module = f"diffusers.pipelines.ltx2{name}"
    return pytest.importorskip(module, reason=f"runs with a diffusers that has {module}; constraints.txt names one")


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
    connectors = ltx2_module().LTX2TextConnectors(
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
    condition = ltx2_module(".pipeline_ltx2_condition").LTX2VideoCondition
    return dict(
        prompt_embeds=torch.randn(1, 6, 16), prompt_attention_mask=mask, negative_prompt_embeds=torch.randn(1, 6, 16),
        negative_prompt_attention_mask=mask, height=32, width=32, num_frames=5, num_inference_steps=1,
        spatio_temporal_guidance_blocks=[1],
        conditions=[condition(frames=IMAGE, index=index, crf=0) for index in (0, 3)],
    )  # fmt: skip


def ltx2_condition():
    return pipeline("LTX2ConditionPipeline")(**ltx2_parts()), ltx2_prompt()


def ltx2_in_context():
    """An in-context reference without a mask of its own."""
    pipe = pipeline("LTX2InContextPipeline")(**ltx2_parts())
    reference = ltx2_module(".pipeline_ltx2_ic_lora").LTX2ReferenceCondition(frames=VIDEO[:2])
    return pipe, ltx2_prompt() | dict(reference_conditions=[reference])


def ltx2_dfr():
    """Keyframe slots after the video, and coordinates instead of extents."""
    parts = ltx2_parts() | dict(transformer=transformer("ltx2.3", use_keyframes_abs_pos_embedding=True))
    pipe = pipeline("LTX2DFRPipeline")(**parts)
    inputs = ltx2_prompt()
    names = ("prompt_embeds", "prompt_attention_mask", "height", "width", "conditions")
    return pipe, {name: inputs[name] for name in names} | dict(num_frames=9, sigmas=[1.0])


def ltx2_hdr():
    pipe = pipeline("LTX2HDRPipeline")(**ltx2_parts())
    module = ltx2_module(".pipeline_ltx2_hdr_lora")
    inputs = ltx2_prompt() | dict(reference_conditions=[module.LTX2HDRReferenceCondition(frames=VIDEO[:2])])
    del inputs["conditions"]
    return pipe, inputs


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
    vae = diffusers.AutoencoderKLWan(base_dim=2, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    pipe = pipeline("Cosmos3OmniPipeline")(
        transformer=model, text_tokenizer=Tokenizer(), vae=vae, scheduler=diffusers.UniPCMultistepScheduler(),
        enable_safety_checker=False,
    )  # fmt: skip
    return pipe, dict(
        prompt="A small boat", image=IMAGE, height=96, width=96, num_frames=17, num_inference_steps=2,
        use_system_prompt=False,
    )  # fmt: skip


CONTEXT_PIPELINES = [
    ltx_condition,
    ltx_long,
    helios,
    helios_pyramid,
    ltx2_condition,
    ltx2_in_context,
    ltx2_dfr,
    ltx2_hdr,
    cosmos3,
]
