"""MiniMax-H3: one packed sequence of text, conditions, references, audio, and at its end the video.

With gates its attention is that of FastH3 (FastVideo's backend VIDEO_SPARSE_ATTN_H3): the coarse branch has tiles of
all rows, and the gate weighs it in every row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.models.transformers import transformer_minimax_h3

from ..coarse import add_packed_coarse
from ..processor import FamilyAttnProcessor
from .family import NORMED, Family, Grid


class MiniMaxH3VSAProcessor(FamilyAttnProcessor):
    """Stands in for `MiniMaxH3AttnProcessor`."""

    surplus = "before"
    stock = transformer_minimax_h3.MiniMaxH3AttnProcessor

    def __call__(
        self,
        attn: torch.nn.Module,
        hidden_states: torch.Tensor,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        shape = self.sparse_shape(hidden_states.shape[1], attention_mask)
        if shape is None:
            return self.original(attn, hidden_states, rotary_emb, attention_mask)
        if attn.fused_projections:
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        query, key, value = (x.unflatten(-1, (attn.heads, -1)) for x in (query, key, value))
        query, key = attn.norm_q(query), attn.norm_k(key)
        if rotary_emb is not None:
            query, key = apply_rotary_emb(query, *rotary_emb), apply_rotary_emb(key, *rotary_emb)
        output = self.attend(attn, shape, query, key, value, hidden_states).flatten(2).type_as(query)
        return attn.to_out[1](attn.to_out[0](output))

    def _attend(
        self,
        shape: tuple[int, ...],
        tensors: Sequence[torch.Tensor],
        text: tuple[int, int],
        text_mask: torch.Tensor | None,
        combine: str | None = None,
    ) -> torch.Tensor:
        """As everywhere, but the gated branch has tiles of what precedes the video, too."""
        if not shape or self.config.combine != "gate":
            return super()._attend(shape, tensors, text, text_mask, combine)
        query, key, value, gate = tensors
        segments = self.state.segments or ()
        if sum(segments) + math.prod(shape) != query.shape[1]:
            raise ValueError(
                f"{self.name or 'attention'} sees {query.shape[1]} rows, of which video_shape={shape} has "
                f"{math.prod(shape)}, and text, conditions and audio before it {segments or 'an unknown number'}; the "
                "gated branch has tiles of each, so call the transformer itself, whose inputs tell."
            )
        exact = super()._attend(shape, (query, key, value), text, text_mask, "sparse")
        block = self._tiles()["block_size"]
        tensors = (exact, gate, query, key, value)
        return add_packed_coarse(*tensors, segments, shape, block, self.config.implementation)


def apply_rotary_emb(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the first channels of `[batch, sequence, heads, head_dim]` by cos and sin `[sequence, channels]`."""
    rotated, rest = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], dim=-1)
    first, second = rotated.chunk(2, dim=-1)
    cos, sin = (each.to(x.dtype)[:, None] for each in (cos, sin))
    return torch.cat([rotated * cos + torch.cat([-second, first], -1) * sin, rest], -1)


def read_grid(transformer: torch.nn.Module, inputs: Mapping[str, Any]) -> Grid | None:
    """Numbers of different coordinates in the last run of video rows; earlier runs are conditions and references."""
    rows, positions = inputs["video_indices"], inputs["position_ids"]
    run = (rows.diff(prepend=rows[:1] - 1) != 1).cumsum(0)
    target = positions[rows[run == run[-1]]]
    t, h, w = (axis.unique().numel() for axis in target.T)
    whole = math.prod((t, h, w)) == len(target) and rows[-1] == len(positions) - 1
    return (t, h, w) if whole else None


def read_segments(transformer: torch.nn.Module, inputs: Mapping[str, Any]) -> tuple[int, ...]:
    """Numbers of the rows of text, of all conditions together, and of audio.

    Where references mix video and audio rows, the segments are of these lengths, too, as in FastVideo.
    """
    video, text, audio = (len(inputs[f"{kind}_indices"]) for kind in ("video", "text", "audio"))
    rows = inputs["video_indices"]
    conditions = torch.arange(video, device=rows.device)[rows.diff(prepend=rows[:1] - 1) != 1][-1:]
    return text, int(conditions.sum()), audio


def plan(transformer: torch.nn.Module) -> Mapping[str, Any]:
    """That of diffusers: one packed sequence."""
    return transformer._cp_plan


FAMILY = Family(
    name="MiniMax-H3",
    transformers=("MiniMaxH3Transformer3DModel",),
    modules=r"transformer_blocks\.\d+\.attn",
    processor=MiniMaxH3VSAProcessor,
    read_grid=read_grid,
    needs=(*NORMED, "fused_projections"),
    checkpoints=("MiniMaxAI/MiniMax-H3",),
    stays_dense="token refiner; text, audio and reference tokens attend densely",
    trained_gates=(
        "FastVideo/FastVideo-FastH3-8-Step-V2",
        "FastVideo/FastVideo-FastH3-4-step-Preview-v1-VSA-DataFree",
        "FastVideo/FastVideo-FastH3-4-step-Preview-v1-VSA-Synthetic-Step1300",
        "FastVideo/FastVideo-FastH3-4-step-Preview-v1-VSA-Synthetic-Step1900",
    ),
    gate_bias=False,
    read_segments=read_segments,
    plan=plan,
    stock_ring=True,
)
