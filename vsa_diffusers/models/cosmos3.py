"""Cosmos 3: the generated video attends to a causal text stream and to itself, with grouped keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers import transformer_cosmos3

from ..parallel import Exchange
from ..processor import FamilyAttnProcessor
from .family import Family, Grid

COSMOS3 = (
    *("processor", "head_dim", "num_key_value_groups", "to_q", "to_k", "to_v", "norm_q", "norm_k", "to_out"),
    *("add_q_proj", "add_k_proj", "add_v_proj", "norm_added_q", "norm_added_k", "k_norm_und_for_gen", "to_add_out"),
)
"""What its attention modules have, and their processors use."""


class Cosmos3VSAProcessor(FamilyAttnProcessor):
    """Stands in for `Cosmos3AttnProcessor`: causal text as there, sparse attention for the video."""

    streams = ("und_seq", "gen_seq")
    # Sound and action tokens follow the video tokens.
    surplus = "after"
    stock = transformer_cosmos3.Cosmos3AttnProcessor

    def __call__(
        self,
        attn: torch.nn.Module,
        und_seq: torch.Tensor,
        gen_seq: torch.Tensor,
        rotary_emb: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        shape = self.sparse_shape(gen_seq.shape[0], None)
        if shape is None:
            return self.original(attn, und_seq, gen_seq, rotary_emb)
        heads = (-1, attn.head_dim)
        query, key, value = (to(und_seq).unflatten(-1, heads) for to in (attn.to_q, attn.to_k, attn.to_v))
        added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        video_query, video_key, video_value = (to(gen_seq).unflatten(-1, heads) for to in added)
        query, key = attn.norm_q(query), attn.norm_k(key)
        text_key = key if attn.k_norm_und_for_gen is None else attn.k_norm_und_for_gen(key)
        query, key, text_key = (apply_rotary_emb(x, *rotary_emb[:2]) for x in (query, key, text_key))
        video_query = apply_rotary_emb(attn.norm_added_q(video_query), *rotary_emb[2:])
        video_key = apply_rotary_emb(attn.norm_added_k(video_key), *rotary_emb[2:])
        text = dispatch_attention_fn(
            query[None], key[None], value[None], is_causal=True, enable_gqa=True, backend=self._attention_backend
        )
        # The op wants as many queries as keys: the text has keys alone here, and the output of its queries is dropped.
        query = torch.cat([query, video_query])
        key = torch.cat([text_key, video_key]).repeat_interleave(attn.num_key_value_groups, dim=1)
        value = torch.cat([value, video_value]).repeat_interleave(attn.num_key_value_groups, dim=1)
        length = und_seq.shape[0]
        output = self.attend(attn, shape, query[None], key[None], value[None], gen_seq[None], text=(length, 0))
        return attn.to_out(text[0].flatten(1)), attn.to_add_out(output[0, length:].flatten(1))


def apply_rotary_emb(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the halves of `[sequence, heads, head_dim]` by cos and sin `[sequence, head_dim]`."""
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]


def read_grid(transformer: torch.nn.Module, inputs: Mapping[str, Any]) -> Grid | None:
    """The patch grid of the video, if there is one video and it comes right after the text."""
    shapes, first = inputs["vision_token_shapes"], inputs["vision_sequence_indexes"][0]
    if len(shapes) != 1 or first != inputs["und_len"]:
        return None
    t, h, w = shapes[0]
    return t, h, w


class _Sharded:
    """The transformer's own functions that split and join its streams, until they are removed."""

    def __init__(self, transformer: torch.nn.Module, exchange: Exchange):
        self.transformer = transformer
        transformer._cp_shard_fn = lambda text, video, rotary: (
            text, exchange.own(video, 0), (*rotary[:2], *(exchange.own(table, 0) for table in rotary[2:]))
        )  # fmt: skip
        transformer._cp_gather_fn = lambda text, video: (text, exchange.gather(video, 0))

    def remove(self) -> None:
        del self.transformer._cp_shard_fn, self.transformer._cp_gather_fn


def parallel_hooks(transformer: torch.nn.Module, exchange: Exchange) -> list[Any]:
    """What diffusers lets a plan say of other transformers, this one is told by functions."""
    return [_Sharded(transformer, exchange)]


FAMILY = Family(
    name="Cosmos 3",
    transformers=("Cosmos3OmniTransformer",),
    modules=r"layers\.\d+\.self_attn",
    processor=Cosmos3VSAProcessor,
    read_grid=read_grid,
    query_projection="add_q_proj",
    needs=COSMOS3,
    checkpoints=("nvidia/Cosmos3-Nano",),
    stays_dense="the text's causal attention; sound and action tokens attend densely",
    plan={},
    parallel_hooks=parallel_hooks,
)
