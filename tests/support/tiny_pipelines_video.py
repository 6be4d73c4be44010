"""Whole pipelines of the families whose attention sees video tokens only, small and random, with arguments for a call.

Text encoders are left out: the calls bring embeddings.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.pipelines import ltx2 as ltx2_pipelines
from PIL import Image
from transformers import BatchFeature, CLIPVisionConfig, CLIPVisionModel

from tiny_models import LTX, LTX2, WAN, Recipe, diffusers_class
from tiny_models_video import ALLEGRO, COSMOS, COSMOS2, COSMOS_CONTROLNET, KANDINSKY5, KANDINSKY6

SIZE = dict(height=96, width=128)
SMALL = dict(height=64, width=64)
TINY = dict(height=32, width=32, num_frames=5)
CALL = dict(num_inference_steps=2, guidance_scale=3.0, output_type="latent")
TEXT = dict(num_frames=17, **SIZE, **CALL)
PICTURE = SIZE | CALL
QUERIES = {
    "Kandinsky5Transformer3DModel": ("to_query", "to_key", "to_value"),
    "Kandinsky6Transformer3DModel": ("to_query", "to_key", "to_value"),
    None: ("to_q", "to_k", "to_v"),
}


@dataclass(frozen=True)
class PipelineRecipe:
    """How to build one pipeline class, and how to call it.

    Args:
        cls: class name in diffusers.
        parts: makes its components; those not named are `None`.
        arguments: makes the arguments of a call.
        name: of the test case, where a class has several.
    """

    cls: str
    parts: Callable[[], dict[str, Any]]
    arguments: Callable[[], dict[str, Any]]
    name: str | None = None

    def is_available(self) -> bool:
        """Whether the installed diffusers has this class, with these arguments."""
        cls = diffusers_class(self.cls)
        return cls is not None and self.arguments().keys() <= inspect.signature(cls.__call__).parameters.keys()

    def build(self) -> diffusers.DiffusionPipeline:
        torch.manual_seed(0)
        cls = getattr(diffusers, self.cls)
        needed = [name for name, each in inspect.signature(cls).parameters.items() if each.default is each.empty]
        pipe = cls(**dict.fromkeys(needed) | self.parts())
        pipe.set_progress_bar_config(disable=True)
        if hasattr(pipe, "resolutions"):
            pipe.resolutions = [
                (SIZE["width"], SIZE["height"])
            ]  # those that the image models were trained for take long
        return pipe

    def run(self, pipe: diffusers.DiffusionPipeline) -> torch.Tensor:
        torch.manual_seed(1)
        output = pipe(**self.arguments(), return_dict=False)[0]
        return torch.stack(list(output)) if isinstance(output, (list, tuple)) else torch.as_tensor(output)


def transformer(cls, config, **changes):
    return Recipe("", cls, config | changes, None, (1, 2, 2), 0, 0, projections=QUERIES.get(cls, QUERIES[None])).build()


def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (96, 128, 3), dtype=np.uint8))


def video(frames=17):
    pixels = np.random.default_rng(0).integers(0, 255, (frames, 96, 128, 3), dtype=np.uint8)
    return [Image.fromarray(frame) for frame in pixels]


def embeddings(length=8, channels=16):
    return dict(prompt_embeds=torch.randn(1, length, channels), negative_prompt_embeds=torch.randn(1, length, channels))


def image_and_text():
    # Cross-attention takes the last 512 tokens as text, and whatever precedes them as image tokens.
    return embeddings(512) | dict(image=image())


def image_encoder():
    config = CLIPVisionConfig(
        hidden_size=20, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    return dict(image_encoder=CLIPVisionModel(config).eval(), image_processor=clip_pixels)


def clip_pixels(images, return_tensors):
    return BatchFeature({"pixel_values": torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16)})


def wan_vae():
    return diffusers.AutoencoderKLWan(
        base_dim=2, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    ).eval()


def flow():
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)


def flow_map():
    return diffusers.FlowMapEulerDiscreteScheduler()


def unipc():
    return diffusers.UniPCMultistepScheduler(
        flow_shift=3.0, use_flow_sigmas=True, prediction_type="flow_prediction", num_train_timesteps=1000
    )


WAN16 = WAN | dict(in_channels=16, out_channels=16)
WAN_IMAGE = WAN16 | dict(in_channels=36, image_dim=20, added_kv_proj_dim=64)


def wan(cls="WanTransformer3DModel", config=WAN16, scheduler=unipc):
    def parts():
        encoder = image_encoder() if config.get("image_dim") else {}
        return dict(transformer=transformer(cls, config), vae=wan_vae(), scheduler=scheduler(), **encoder)

    return parts


def wan22(config=WAN16):
    return lambda: (
        wan(config=config)() | dict(transformer_2=transformer("WanTransformer3DModel", config), boundary_ratio=0.9)
    )


SKYREELS = "SkyReelsV2Transformer3DModel"
FORCING = dict(prompt=None, base_num_frames=17, overlap_history=None, ar_step=0)


class NoGuardrail:
    """Stands in for Cosmos' safety checker, an optional package."""

    def to(self, device):
        return self

    def check_text_safety(self, text):
        return True

    def check_video_safety(self, frames):
        return frames


def cosmos1():
    vae = diffusers.AutoencoderKLCosmos(
        latent_channels=4, encoder_block_out_channels=(8, 8, 8, 8), decode_block_out_channels=(8, 8, 8, 8),
        attention_resolutions=(8,), resolution=64, num_layers=2, spatial_compression_ratio=8,
        temporal_compression_ratio=4, latents_mean=[0.0] * 20, latents_std=[1.0] * 20,
    )  # fmt: skip
    scheduler = diffusers.EDMEulerScheduler(
        sigma_min=0.002, sigma_max=80, sigma_data=0.5, sigma_schedule="karras", prediction_type="epsilon",
        final_sigmas_type="sigma_min",
    )  # fmt: skip
    return dict(
        transformer=transformer("CosmosTransformer3DModel", COSMOS), vae=vae.eval(), scheduler=scheduler,
        safety_checker=NoGuardrail(),
    )  # fmt: skip


def cosmos1_video():
    return cosmos1() | dict(transformer=transformer("CosmosTransformer3DModel", COSMOS, in_channels=5))


def cosmos2(config=COSMOS2, **changes):
    return lambda: dict(
        transformer=transformer("CosmosTransformer3DModel", config | dict(in_channels=17, out_channels=16) | changes),
        vae=wan_vae(), scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True),
        safety_checker=NoGuardrail(),
    )  # fmt: skip


def cosmos25(**changes):
    return lambda: cosmos2(**changes)() | dict(scheduler=diffusers.UniPCMultistepScheduler())


def cosmos25_transfer():
    controlnet = transformer("CosmosControlNetModel", COSMOS_CONTROLNET, in_channels=130, latent_channels=18)
    parts = cosmos25(controlnet_block_every_n=1, max_size=(32, 32, 32))()
    return parts | dict(controlnet=controlnet)


def allegro():
    vae = diffusers.AutoencoderKLAllegro(
        block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2, sample_size=64
    )
    scheduler = diffusers.EulerAncestralDiscreteScheduler()
    return dict(transformer=transformer("AllegroTransformer3DModel", ALLEGRO), vae=vae.eval(), scheduler=scheduler)


def kandinsky5(image=False):
    def parts():
        vae = diffusers.AutoencoderKLHunyuanVideo(
            latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
        )
        model = transformer("Kandinsky5Transformer3DModel", KANDINSKY5, visual_cond=image)
        return dict(transformer=model, vae=vae.eval(), scheduler=flow())

    return parts


DOWN, UP = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4


def kandinsky5_picture(image=False):
    def parts():
        vae = diffusers.AutoencoderKL(block_out_channels=(8, 8, 8, 8), norm_num_groups=4, down_block_types=DOWN,
                                      up_block_types=UP)  # fmt: skip
        return kandinsky5(image)() | dict(vae=vae.eval())

    return parts


def kandinsky5_embeddings():
    embeds = {}
    for prefix in ("", "negative_"):
        embeds[f"{prefix}prompt_embeds_qwen"] = torch.randn(1, 8, 16)
        embeds[f"{prefix}prompt_embeds_clip"] = torch.randn(1, 16)
        embeds[f"{prefix}prompt_cu_seqlens"] = torch.tensor([0, 8])
    return embeds


def kandinsky6():
    parts = kandinsky5()()
    return parts | dict(transformer=transformer("Kandinsky6Transformer3DModel", KANDINSKY6))


def kandinsky6_embeddings():
    """Sound needs an audio VAE and a vocoder; the transformer's own test brings it."""
    pooled = dict(pooled_prompt_embeds=torch.randn(1, 16), negative_pooled_prompt_embeds=torch.randn(1, 16))
    return embeddings() | pooled | dict(sample_audio=False)


def masked_embeddings(length=6):
    mask = torch.tensor([[1] * 4 + [0] * (length - 4)])
    return embeddings(length) | dict(prompt_attention_mask=mask, negative_prompt_attention_mask=mask)


def ltx2_embeddings():
    mask = torch.ones(1, 6)
    return embeddings(6, 32) | dict(prompt_attention_mask=mask, negative_prompt_attention_mask=mask)


def ltx():
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1, 1), patch_size=1,
        spatio_temporal_scaling=(True, True, False, False), decoder_spatio_temporal_scaling=(True, True, False, False),
    )  # fmt: skip
    return dict(transformer=transformer("LTXVideoTransformer3DModel", LTX), vae=vae.eval(), scheduler=flow())


CONNECTOR = dict(num_attention_heads=2, attention_head_dim=8, num_layers=1, num_learnable_registers=None)


def ltx2():
    vae = diffusers.AutoencoderKLLTX2Video(
        latent_channels=8, block_out_channels=(8,), decoder_block_out_channels=(8,), layers_per_block=(1,),
        decoder_layers_per_block=(1, 1), spatio_temporal_scaling=(True,), decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False), downsample_type=("spatial",), upsample_residual=(False,),
        upsample_factor=(1,), patch_size=1,
    )  # fmt: skip
    audio_vae = diffusers.AutoencoderKLLTX2Audio(
        base_channels=8, ch_mult=(1,), num_res_blocks=1, latent_channels=2, mel_bins=16
    )
    connectors = ltx2_pipelines.LTX2TextConnectors(
        caption_channels=16, text_proj_in_factor=2, connector_rope_base_seq_len=32, rope_double_precision=False,
        rope_theta=10000.0, causal_temporal_positioning=False,
        **{f"{kind}_connector_{name}": value for kind in ("video", "audio") for name, value in CONNECTOR.items()},
    )  # fmt: skip
    return dict(
        transformer=transformer("LTX2VideoTransformer3DModel", LTX2), vae=vae.eval(), audio_vae=audio_vae.eval(),
        connectors=connectors.eval(), scheduler=flow(),
    )  # fmt: skip
