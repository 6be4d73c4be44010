"""Kandinsky 6: the video stream's self-attention. Audio has a stream of its own."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.transformers import transformer_kandinsky6

from ..parallel import Exchange
from ..processor import FamilyAttnProcessor
from .family import Family
from .kandinsky5 import KANDINSKY, read_grid
from .spread import TOKENS, before, join_first_output, video_keys


class Kandinsky6VSAProcessor(FamilyAttnProcessor):
    """Stands in for `Kandinsky6AttnProcessor`."""

    stock = transformer_kandinsky6.Kandinsky6AttnProcessor
    only_video = False

    def __call__(
        self,
        attn: torch.nn.Module,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: torch.Tensor | None = None,
        rotary_emb_kv: torch.Tensor | None = None,
        attn_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        mask = attention_mask if attn_mask is None else attn_mask
        is_self = encoder_hidden_states is None
        shape = self.sparse_shape(hidden_states.shape[1], mask) if is_self else None
        if shape is None:
            return self.original(attn, hidden_states, encoder_hidden_states, rotary_emb, rotary_emb_kv, mask)
        query, key, value = attn.to_query(hidden_states), attn.to_key(hidden_states), attn.to_value(hidden_states)
        query, key, value = (x.unflatten(2, (attn.num_heads, -1)) for x in (query, key, value))
        query, key = attn.query_norm(query), attn.key_norm(key)
        if rotary_emb is not None:
            query = transformer_kandinsky6.apply_rotary(query, rotary_emb)
        if rotary_emb_kv is not None:
            key = transformer_kandinsky6.apply_rotary(key, rotary_emb_kv)
        return attn.out_layer(self.attend(attn, shape, query, key, value, hidden_states).flatten(2))


def parallel_hooks(transformer: torch.nn.Module, exchange: Exchange) -> list[Any]:
    """Audio attends to the video of all ranks; the blocks return video and audio, which is whole."""
    blocks = transformer.visual_transformer_blocks
    audio = [block.av_cross_attention for block in blocks]
    return [
        *before(blocks, {"vis_rope": lambda table, given: exchange.own(table, 0)}),
        *video_keys(audio, exchange, {"encoder_hidden_states": 1, "rope_kv": 0}),
        *join_first_output(blocks[-1], exchange),
    ]


FAMILY = Family(
    name="Kandinsky 6",
    transformers=("Kandinsky6Transformer3DModel",),
    modules=r"visual_transformer_blocks\.\d+\.video_dec_block\.self_attention",
    processor=Kandinsky6VSAProcessor,
    read_grid=read_grid,
    needs=KANDINSKY,
    checkpoints=("kandinskylab/Kandinsky-6.0-Pro-distill-5s-Diffusers",),
    query_projection="to_query",
    stays_dense="cross-attention, text blocks, audio, audio to video and back",
    plan={"visual_transformer_blocks.0": {"vis": TOKENS}},
    parallel_hooks=parallel_hooks,
)
