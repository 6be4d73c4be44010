"""Allegro."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.attention_processor import AllegroAttnProcessor2_0
from diffusers.models.embeddings import apply_rotary_emb_allegro

from ..parallel import Exchange
from ..processor import FamilyAttnProcessor
from .family import Family, Grid, patches
from .spread import JOINED, VIDEO, before


class AllegroVSAProcessor(FamilyAttnProcessor):
    """Stands in for `AllegroAttnProcessor2_0`."""

    stock = AllegroAttnProcessor2_0

    def __call__(
        self,
        attn: torch.nn.Module,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
        image_rotary_emb: tuple[Any, Any] | None = None,
    ) -> torch.Tensor:
        is_self = encoder_hidden_states is None
        shape = self.sparse_shape(hidden_states.shape[1], attention_mask) if is_self else None
        if shape is None:
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, temb, image_rotary_emb)
        query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in (query, key, value))
        if image_rotary_emb is not None:
            query, key = _rotate(query, *image_rotary_emb), _rotate(key, *image_rotary_emb)
        output = self.attend(attn, shape, query, key, value, hidden_states).flatten(2)
        return attn.to_out[1](attn.to_out[0](output))


def _rotate(x: torch.Tensor, frequencies: Any, positions: Any) -> torch.Tensor:
    # Upstream rotates [batch, heads, sequence, head_dim].
    return apply_rotary_emb_allegro(x.transpose(1, 2), frequencies, positions).transpose(1, 2)


def read_grid(transformer: torch.nn.Module, inputs: Mapping[str, Any]) -> Grid:
    """Patches of `hidden_states` `[batch, channels, frames, height, width]`."""
    patch_t, patch = transformer.config.patch_size_t, transformer.config.patch_size
    return patches(inputs["hidden_states"].shape[-3:], (patch_t, patch, patch))


def parallel_hooks(transformer: torch.nn.Module, exchange: Exchange) -> list[Any]:
    """Rotary tables come with the positions of tokens, which a plan cannot split."""

    def own(rotary: tuple[Any, Any], given: Any) -> tuple[Any, Any]:
        frequencies, positions = rotary
        return frequencies, tuple(exchange.own(axis, 1) for axis in positions)

    return before(transformer.transformer_blocks, {"image_rotary_emb": own})


FAMILY = Family(
    name="Allegro",
    transformers=("AllegroTransformer3DModel",),
    modules=r"transformer_blocks\.\d+\.attn1",
    processor=AllegroVSAProcessor,
    read_grid=read_grid,
    checkpoints=("rhymes-ai/Allegro",),
    plan={"transformer_blocks.0": VIDEO, "proj_out": JOINED},
    parallel_hooks=parallel_hooks,
)
