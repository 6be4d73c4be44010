"""AnyFlow, bidirectional. Its FAR variant is causal and cached, and is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models._modeling_parallel import ContextParallelInput
from diffusers.models.transformers import transformer_anyflow

from ..parallel import Exchange
from ..processor import FamilyAttnProcessor
from .family import NORMED, Family, Grid, patches
from .spread import JOINED, VIDEO, before


class AnyFlowVSAProcessor(FamilyAttnProcessor):
    """Stands in for `AnyFlowAttnProcessor`."""

    stock = transformer_anyflow.AnyFlowAttnProcessor

    def __call__(
        self,
        attn: torch.nn.Module,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: dict[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        is_self = encoder_hidden_states is None
        shape = self.sparse_shape(hidden_states.shape[1], attention_mask) if is_self else None
        if shape is None:
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
        query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        query, key = attn.norm_q(query), attn.norm_k(key)
        query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in (query, key, value))
        if rotary_emb is not None:
            query, key = _rotate(query, rotary_emb["query"]), _rotate(key, rotary_emb["key"])
        output = self.attend(attn, shape, query, key, value, hidden_states).flatten(2)
        return attn.to_out[1](attn.to_out[0](output))


def _rotate(x: torch.Tensor, rotary_emb: torch.Tensor) -> torch.Tensor:
    # Upstream rotates [batch, heads, sequence, head_dim].
    return transformer_anyflow.apply_rotary_emb(x.transpose(1, 2), rotary_emb).transpose(1, 2)


def read_grid(transformer: torch.nn.Module, inputs: Mapping[str, Any]) -> Grid:
    """Patches of `hidden_states`, which is `[batch, frames, channels, height, width]`."""
    _, frames, _, height, width = inputs["hidden_states"].shape
    return patches((frames, height, width), transformer.config.patch_size)


def plan(transformer: torch.nn.Module) -> dict[str, Any]:
    """Noise levels are those of tokens, in the blocks and after the last one."""
    levels = ContextParallelInput(split_dim=1, expected_dims=4)
    return {"blocks.0": VIDEO, "blocks.*": {"temb": levels}, f"blocks.{len(transformer.blocks) - 1}": JOINED}


def parallel_hooks(transformer: torch.nn.Module, exchange: Exchange) -> list[Any]:
    """Rotary tables by name, which a plan cannot split."""

    def own(tables: dict[str, torch.Tensor], given: Any) -> dict[str, torch.Tensor]:
        return {name: exchange.own(table, 2) for name, table in tables.items()}

    return before(transformer.blocks, {"rotary_emb": own})


FAMILY = Family(
    name="AnyFlow",
    transformers=("AnyFlowTransformer3DModel",),
    modules=r"blocks\.\d+\.attn1",
    processor=AnyFlowVSAProcessor,
    read_grid=read_grid,
    needs=NORMED,
    checkpoints=("nvidia/AnyFlow-Wan2.1-T2V-1.3B-Diffusers", "nvidia/AnyFlow-Wan2.1-T2V-14B-Diffusers"),
    plan=plan,
    parallel_hooks=parallel_hooks,
)
