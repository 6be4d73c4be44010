"""Helios: history tokens at three resolutions come before the video tokens."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models._modeling_parallel import ContextParallelInput
from diffusers.models.transformers import transformer_helios

from ..parallel import Exchange
from ..processor import FamilyAttnProcessor
from .family import NORMED, Family, patchified_grid
from .spread import JOINED, TOKENS, VIDEO, before


class HeliosVSAProcessor(FamilyAttnProcessor):
    """Stands in for `HeliosAttnProcessor`."""

    surplus = "before"
    stock = transformer_helios.HeliosAttnProcessor

    def __call__(
        self,
        attn: torch.nn.Module,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: torch.Tensor | None = None,
        original_context_length: int | None = None,
    ) -> torch.Tensor:
        is_self = encoder_hidden_states is None
        shape = self.sparse_shape(hidden_states.shape[1], attention_mask) if is_self else None
        if shape is None:
            rest = (encoder_hidden_states, attention_mask, rotary_emb, original_context_length)
            return self.original(attn, hidden_states, *rest)
        if attn.fused_projections:
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        query, key = attn.norm_q(query), attn.norm_k(key)
        query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in (query, key, value))
        if rotary_emb is not None:
            query = transformer_helios.apply_rotary_emb_transposed(query, rotary_emb)
            key = transformer_helios.apply_rotary_emb_transposed(key, rotary_emb)
        if attn.is_amplify_history:
            history = hidden_states.shape[1] - original_context_length
            factor = 1 + torch.sigmoid(attn.history_key_scale).type_as(key) * (attn.max_scale - 1)  # [1] or [heads]
            key = torch.cat([key[:, :history] * factor[:, None], key[:, history:]], 1)
        output = self.attend(attn, shape, query, key, value, hidden_states).flatten(2).type_as(query)
        return attn.to_out[1](attn.to_out[0](output))


def plan(transformer: torch.nn.Module) -> dict[str, Any]:
    """History and video as one sequence; diffusers' own plan gathers thrice a block, and names 40 of them."""
    levels = ContextParallelInput(split_dim=1, expected_dims=4)
    last = f"blocks.{len(transformer.blocks) - 1}"
    return {"blocks.0": VIDEO, "blocks.*": {"temb": levels, "rotary_emb": TOKENS}, last: JOINED}


def parallel_hooks(transformer: torch.nn.Module, exchange: Exchange) -> list[Any]:
    """Blocks tell history and video apart by the video's length: that of a rank is what history leaves it."""

    def of_this_rank(length: int, given: dict[str, Any]) -> int:
        sizes = exchange.shares(given["rotary_emb"].shape[1])
        begin = exchange.start(sizes)
        return min(max(begin + sizes[exchange.rank] - (sum(sizes) - length), 0), sizes[exchange.rank])

    return before(transformer.blocks, {"original_context_length": of_this_rank})


FAMILY = Family(
    name="Helios",
    transformers=("HeliosTransformer3DModel",),
    modules=r"blocks\.\d+\.attn1",
    processor=HeliosVSAProcessor,
    read_grid=patchified_grid,
    needs=(*NORMED, "fused_projections", "is_amplify_history"),
    checkpoints=("BestWishYsh/Helios-Base",),
    stays_dense="cross-attention; history tokens attend densely",
    plan=plan,
    parallel_hooks=parallel_hooks,
)
