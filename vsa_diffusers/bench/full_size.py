"""Published video transformers by configuration alone: random weights, and inputs as their pipelines pass them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

TINY_LATENTS = (5, 10, 12)


@dataclass(frozen=True)
class FullSize:
    """One published transformer at one resolution.

    Args:
        name: for the command line.
        cls: class name in diffusers.
        checkpoint: whose configuration this is.
        config: constructor arguments that differ from the defaults of `cls`.
        tiny: constructor arguments of a small model of the same make.
        video: frames, height and width in pixels, as users give them.
        latents: frames, height and width in latent cells.
        patch: latent cells per token along each axis.
        inputs: forward's keyword arguments, from `(config, batch, latents, device, dtype)`.
        batch: 2 where the pipeline runs both halves of classifier-free guidance in one call.
    """

    name: str
    cls: str
    checkpoint: str
    config: dict[str, Any]
    tiny: dict[str, Any]
    video: tuple[int, int, int]
    latents: tuple[int, int, int]
    patch: tuple[int, int, int]
    inputs: Callable[..., dict[str, Any]]
    batch: int = 1

    def video_shape(self, tiny: bool = False) -> tuple[int, int, int]:
        """The grid of video tokens."""
        latents = TINY_LATENTS if tiny else self.latents
        frames, height, width = (extent // patch for extent, patch in zip(latents, self.patch, strict=True))
        return frames, height, width

    def build(self, device: str, dtype: torch.dtype, tiny: bool = False) -> torch.nn.Module:
        """The transformer with random weights, made on `device`; fp32 where `from_pretrained` keeps fp32."""
        import diffusers

        config = self.config | (self.tiny if tiny else {})
        with torch.device(device), default_dtype(dtype):
            model = getattr(diffusers, self.cls)(**config).eval().requires_grad_(False)
        for name, parameter in model.named_parameters():
            if set(model._keep_in_fp32_modules or []) & set(name.split(".")):
                parameter.data = parameter.data.float()
        return model

    def make_inputs(self, config: Any, device: str, dtype: torch.dtype, tiny: bool = False) -> dict[str, Any]:
        """Random inputs for the `config` of a model that `build` made."""
        return self.inputs(config, self.batch, TINY_LATENTS if tiny else self.latents, device, dtype)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """New floating tensors are of `dtype` inside."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def wan_inputs(config, batch, latents, device, dtype) -> dict[str, Any]:
    """Text of 512 tokens."""
    return {
        "hidden_states": torch.randn(batch, config.in_channels, *latents, device=device, dtype=dtype),
        "timestep": torch.full((batch,), 700, device=device),
        "encoder_hidden_states": torch.randn(batch, 512, config.text_dim, device=device, dtype=dtype),
    }


def hunyuan_inputs(config, batch, latents, device, dtype) -> dict[str, Any]:
    """Text padded to 256 tokens, of which 100 are valid."""
    mask = (torch.arange(256, device=device) < 100).to(dtype).expand(batch, 256)
    return {
        "hidden_states": torch.randn(batch, config.in_channels, *latents, device=device, dtype=dtype),
        "timestep": torch.full((batch,), 700, device=device, dtype=dtype),
        "encoder_hidden_states": torch.randn(batch, 256, config.text_embed_dim, device=device, dtype=dtype),
        "encoder_attention_mask": mask,
        "pooled_projections": torch.randn(batch, config.pooled_projection_dim, device=device, dtype=dtype),
        "guidance": torch.full((batch,), 6000.0, device=device, dtype=dtype),
    }


def cogvideox_inputs(config, batch, latents, device, dtype) -> dict[str, Any]:
    """Text of 226 tokens; the pipeline makes the rotary embedding."""
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    frames, height, width = latents
    grid = (height // 2, width // 2)
    return {
        "hidden_states": torch.randn(batch, frames, config.in_channels, height, width, device=device, dtype=dtype),
        "encoder_hidden_states": torch.randn(batch, 226, config.text_embed_dim, device=device, dtype=dtype),
        "timestep": torch.full((batch,), 700, device=device),
        "image_rotary_emb": get_3d_rotary_pos_embed(
            config.attention_head_dim, ((0, 0), grid), grid, frames, device=torch.device(device)
        ),
    }


def ltx2_inputs(config, batch, latents, device, dtype) -> dict[str, Any]:
    """Text of 1024 tokens; audio of the video's length at 24 frames per second, 25 latents per second."""
    frames, height, width = latents
    audio = round((8 * (frames - 1) + 1) / 24 * 25)
    mask = torch.ones(batch, 1024, device=device, dtype=torch.int64)
    text = (batch, 1024, config.caption_channels)
    return {
        "hidden_states": torch.randn(batch, math.prod(latents), config.in_channels, device=device, dtype=dtype),
        "audio_hidden_states": torch.randn(batch, audio, config.audio_in_channels, device=device, dtype=dtype),
        "encoder_hidden_states": torch.randn(text, device=device, dtype=dtype),
        "audio_encoder_hidden_states": torch.randn(text, device=device, dtype=dtype),
        "timestep": torch.full((batch,), 700.0, device=device),
        "encoder_attention_mask": mask,
        "audio_encoder_attention_mask": mask,
        "num_frames": frames,
        "height": height,
        "width": width,
        "fps": 24.0,
        "audio_num_frames": audio,
    }


_TINY: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 2}
_TINY_WAN = _TINY | {"text_dim": 16, "freq_dim": 16, "ffn_dim": 32}
_LTX2: dict[str, Any] = {
    "cls": "LTX2VideoTransformer3DModel",
    "checkpoint": "Lightricks/LTX-2",
    "config": {"rope_type": "split"},
    "tiny": _TINY
    | {"in_channels": 8, "out_channels": 8, "cross_attention_dim": 64, "caption_channels": 16, "audio_in_channels": 8}
    | {"audio_out_channels": 8, "audio_num_attention_heads": 2, "audio_attention_head_dim": 16}
    | {"audio_cross_attention_dim": 32},
    "patch": (1, 1, 1),
    "inputs": ltx2_inputs,
}

FULL_SIZES = {
    size.name: size
    for size in (
        FullSize(
            "wan1.3b-480p", "WanTransformer3DModel", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
            {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
            _TINY_WAN, (81, 480, 832), (21, 60, 104), (1, 2, 2), wan_inputs,
        ),
        FullSize(name="ltx2-512p", video=(121, 512, 768), latents=(16, 16, 24), **_LTX2),
        FullSize(name="ltx2-1080p", video=(121, 1088, 1920), latents=(16, 34, 60), **_LTX2),
        FullSize(
            "cogvideox5b-480p", "CogVideoXTransformer3DModel", "THUDM/CogVideoX-5b",
            {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True},
            _TINY | {"in_channels": 4, "out_channels": 4, "time_embed_dim": 8, "text_embed_dim": 16},
            (49, 480, 720), (13, 60, 90), (1, 2, 2), cogvideox_inputs, batch=2,
        ),
        FullSize(
            "wan14b-720p", "WanTransformer3DModel", "Wan-AI/Wan2.1-T2V-14B-Diffusers",
            {}, _TINY_WAN, (81, 720, 1280), (21, 90, 160), (1, 2, 2), wan_inputs,
        ),
        FullSize(
            "hunyuan-720p", "HunyuanVideoTransformer3DModel", "hunyuanvideo-community/HunyuanVideo",
            {}, _TINY | {"num_single_layers": 2, "num_refiner_layers": 1, "text_embed_dim": 16,
                         "pooled_projection_dim": 8, "rope_axes_dim": (8, 12, 12)},
            (129, 720, 1280), (33, 90, 160), (1, 2, 2), hunyuan_inputs,
        ),
    )
}  # fmt: skip
