"""Kandinsky 5 with regular attention. Checkpoints that bring their own sparsity (nabla) run as they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models._modeling_parallel import ContextParallelInput
from diffusers.models.transformers import transformer_kandinsky

from ..processor import FamilyAttnProcessor
from .family import Family, Grid, patches
from .spread import JOINED, TOKENS

KANDINSKY = ("processor", "num_heads", "to_query", "to_key", "to_value", "query_norm", "key_norm", "out_layer")
"""What the attention modules of Kandinsky have, and their processors use."""


class Kandinsky5VSAProcessor(FamilyAttnProcessor):
    """Stands in for `Kandinsky5AttnProcessor`."""

    stock = transformer_kandinsky.Kandinsky5AttnProcessor
    only_video = False

    def __call__(
        self,
        attn: torch.nn.Module,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: torch.Tensor | None = None,
        sparse_params: Mapping[str, Any] | None = None,
    ) -> torch.Tensor:
        is_self = encoder_hidden_states is None
        nabla = None if sparse_params is None else "the call has sparse_params, the model's own nabla attention"
        shape = self.sparse_shape(hidden_states.shape[1], attention_mask, nabla) if is_self else None
        if shape is None:
            return self.original(attn, hidden_states, encoder_hidden_states, rotary_emb, sparse_params)
        query, key, value = attn.to_query(hidden_states), attn.to_key(hidden_states), attn.to_value(hidden_states)
        query, key, value = (x.unflatten(2, (attn.num_heads, -1)) for x in (query, key, value))
        query = attn.query_norm(query.float()).type_as(query)
        key = attn.key_norm(key.float()).type_as(key)
        if rotary_emb is not None:
            query, key = _rotate(query, rotary_emb), _rotate(key, rotary_emb)
        return attn.out_layer(self.attend(attn, shape, query, key, value, hidden_states).flatten(2))


def _rotate(x: torch.Tensor, rotary_emb: torch.Tensor) -> torch.Tensor:
    """Multiply neighbouring pairs by 2 x 2 matrices; like upstream, round to bfloat16 whatever the dtype."""
    pairs = x.float().unflatten(-1, (-1, 1, 2))
    return (rotary_emb * pairs).sum(-1).flatten(-2).bfloat16().type_as(x)


def read_grid(transformer: torch.nn.Module, inputs: Mapping[str, Any]) -> Grid:
    """Patches of `hidden_states`, which is `[batch, frames, height, width, channels]`."""
    return patches(inputs["hidden_states"].shape[1:4], transformer.config.patch_size)


def plan(transformer: torch.nn.Module) -> dict[str, Any]:
    """Visual tokens alone; the last projection wants them back on their grid."""
    last = f"visual_transformer_blocks.{len(transformer.visual_transformer_blocks) - 1}"
    return {
        "visual_transformer_blocks.0": {"visual_embed": TOKENS},
        "visual_transformer_blocks.*": {"rope": ContextParallelInput(split_dim=1, expected_dims=6)},
        last: JOINED,
    }


FAMILY = Family(
    name="Kandinsky 5",
    transformers=("Kandinsky5Transformer3DModel",),
    modules=r"visual_transformer_blocks\.\d+\.self_attention",
    processor=Kandinsky5VSAProcessor,
    read_grid=read_grid,
    needs=KANDINSKY,
    checkpoints=(
        "kandinskylab/Kandinsky-5.0-T2V-Lite-sft-5s-Diffusers",
        "kandinskylab/Kandinsky-5.0-T2V-Pro-sft-5s-Diffusers",
        "kandinskylab/Kandinsky-5.0-I2V-Pro-sft-5s-Diffusers",
        "kandinskylab/Kandinsky-5.0-T2I-Lite-sft-Diffusers",
        "kandinskylab/Kandinsky-5.0-I2I-Lite-sft-Diffusers",
    ),
    query_projection="to_query",
    stays_dense="cross-attention, text blocks; all of it where the checkpoint uses nabla attention",
    plan=plan,
)
