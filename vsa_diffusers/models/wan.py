"""Wan 2.1 and 2.2 (text-, image- and video-to-video) and VACE."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.transformers import transformer_wan

from ..processor import FamilyAttnProcessor
from .family import NORMED, Family, patchified_grid
from .spread import JOINED, PER_TOKEN, TOKENS, VIDEO, tables


class WanVSAProcessor(FamilyAttnProcessor):
    """Stands in for `WanAttnProcessor`."""

    stock = transformer_wan.WanAttnProcessor

    def __call__(
        self,
        attn: torch.nn.Module,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        is_self = encoder_hidden_states is None
        shape = self.sparse_shape(hidden_states.shape[1], attention_mask) if is_self else None
        if shape is None:
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
        if attn.fused_projections:
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        query, key = attn.norm_q(query), attn.norm_k(key)
        query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in (query, key, value))
        if rotary_emb is not None:
            query, key = apply_rotary_emb(query, *rotary_emb), apply_rotary_emb(key, *rotary_emb)
        output = self.attend(attn, shape, query, key, value, hidden_states).flatten(2)
        return attn.to_out[1](attn.to_out[0](output))


def apply_rotary_emb(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate neighbouring pairs of `[batch, sequence, heads, head_dim]`; cos and sin repeat each angle twice."""
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    return torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], -1).flatten(-2).type_as(x)


def plan(transformer: torch.nn.Module) -> dict[str, Any]:
    """That of diffusers, which VACE has none of: its control stream is a second sequence of equal length."""
    spread: dict[str, Any] = {
        "rope": tables(1, 4), "blocks.0": VIDEO, "proj_out": JOINED, "": {"timestep": PER_TOKEN}
    }  # fmt: skip
    if hasattr(transformer, "vace_blocks"):
        spread["vace_blocks.0"] = VIDEO | {"control_hidden_states": TOKENS}
    return spread


FAMILY = Family(
    name="Wan",
    transformers=("WanTransformer3DModel", "WanVACETransformer3DModel"),
    modules=r"(vace_)?blocks\.\d+\.attn1",
    processor=WanVSAProcessor,
    read_grid=patchified_grid,
    needs=(*NORMED, "fused_projections"),
    checkpoints=(
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        "Wan-AI/Wan2.1-T2V-14B-Diffusers",
        "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers",
        "Wan-AI/Wan2.1-VACE-1.3B-diffusers",
        "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
        "Wan-AI/Wan2.2-I2V-A14B-Diffusers",
        "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
        "decart-ai/Lucy-Edit-Dev",
    ),
    trained_gates=(
        "FastVideo/FastWan2.1-T2V-1.3B-Diffusers",
        "FastVideo/FastWan2.1-T2V-14B-Diffusers",
        "FastVideo/Wan2.1-VSA-T2V-14B-720P-Diffusers",
    ),
    plan=plan,
    stock_ring=True,
)
