"""Cosmos 1, Predict 2 and 2.5, and the ControlNet of Transfer 2.5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers import transformer_cosmos

from ..processor import FamilyAttnProcessor
from .family import NORMED, Family, Grid, patches
from .spread import JOINED, TOKENS, VIDEO, tables


class CosmosVSAProcessor(FamilyAttnProcessor):
    """Stands in for `CosmosAttnProcessor2_0`."""

    stock = transformer_cosmos.CosmosAttnProcessor2_0

    def __call__(
        self,
        attn: torch.nn.Module,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        is_self = encoder_hidden_states is None
        shape = self.sparse_shape(hidden_states.shape[1], attention_mask) if is_self else None
        if shape is None:
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in (query, key, value))
        query, key = attn.norm_q(query), attn.norm_k(key)
        if image_rotary_emb is not None:
            query, key = _rotate(query, image_rotary_emb), _rotate(key, image_rotary_emb)
        output = self.attend(attn, shape, query, key, value, hidden_states).flatten(2)
        return attn.to_out[1](attn.to_out[0](output))


def _rotate(x: torch.Tensor, rotary_emb: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    # Upstream rotates [batch, heads, sequence, head_dim].
    return apply_rotary_emb(x.transpose(1, 2), rotary_emb, use_real=True, use_real_unbind_dim=-2).transpose(1, 2)


def read_grid(transformer: torch.nn.Module, inputs: Mapping[str, Any]) -> Grid:
    """Patches of the latents `[batch, channels, frames, height, width]`; the ControlNet's have a name of their own."""
    latents = inputs["hidden_states"] if "hidden_states" in inputs else inputs["controls_latents"]
    return patches(latents.shape[-3:], transformer.config.patch_size)


def parallel_obstacle(transformer: torch.nn.Module) -> str | None:
    """That of the ControlNet."""
    if not hasattr(transformer, "control_blocks"):
        return None
    return "its residuals enter the transformer whole, so every rank runs all of it, which needs no enable_parallelism"


LEVELS = {"embedded_timestep": TOKENS, "temb": TOKENS}
"""Noise levels, which may be those of tokens."""

FAMILY = Family(
    name="Cosmos 1, Predict 2, Predict 2.5, Transfer 2.5",
    transformers=("CosmosTransformer3DModel", "CosmosControlNetModel"),
    modules=r"(transformer|control)_blocks\.\d+\.attn1",
    processor=CosmosVSAProcessor,
    read_grid=read_grid,
    needs=NORMED,
    checkpoints=(
        "nvidia/Cosmos-1.0-Diffusion-7B-Text2World",
        "nvidia/Cosmos-1.0-Diffusion-7B-Video2World",
        "nvidia/Cosmos-Predict2-2B-Text2Image",
        "nvidia/Cosmos-Predict2-2B-Video2World",
        "nvidia/Cosmos-Predict2-14B-Video2World",
        "nvidia/Cosmos-Predict2.5-2B",
        "nvidia/Cosmos-Transfer2.5-2B",
    ),
    plan={
        "rope": tables(0, 2),
        "transformer_blocks.0": VIDEO,
        "transformer_blocks.*": dict.fromkeys(
            ("embedded_timestep", "temb", "extra_pos_emb", "controlnet_residual"), TOKENS
        ),
        "norm_out": LEVELS,
        "proj_out": JOINED,
    },
    parallel_obstacle=parallel_obstacle,
)
