"""What one forward of a transformer computes, counted from its modules without weights."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import torch

from ..models import Family, require_family
from ..models.family import Grid

_HEADS = ("heads", "num_heads", "num_attention_heads")
# Linear layers in the blocks of video attention that video tokens do not pass: modulation, text, audio, faces.
_NOT_VIDEO = (
    r"norm\w*\.linear|modulation|adaln",
    r"add_[qkv]_proj|to_add_out|ff_context|txt_ff",
    r"(attn2|cross_attn|cross_attention)\.(to_(k|v|key|value)$)",
    r"audio_(attn|ff|dec)|audio_to_video_attn\.to_[kv]$|video_to_audio_attn\.to_(q|out)|av_cross_attention\.",
)
# Cosmos 3 has the projections of its video under the names that others give to those of text.
_NOT_VIDEO_OF = {"Cosmos 3": (r"self_attn\.to_([qkv]$|out|add_out$)(?<!to_add_out)", r"\.mlp\.")}
_CROSS = re.compile(r"(attn2|cross_attn|cross_attention)")


@dataclass(frozen=True)
class Costs:
    """The size of a transformer, as far as its time depends on it.

    Args:
        family: that serves it.
        layers: names of its video self-attention modules, in order.
        heads: of one of them.
        head_dim: of one head.
        parameters: of the whole transformer.
        video_parameters: of the linear layers that every video token passes.
        cross_width: channels that video queries have in all cross-attention together.
        tiled: by layer, the factor on the grid's frames: one family attends over two videos in some.
    """

    family: Family
    layers: tuple[str, ...]
    heads: int
    head_dim: int
    parameters: int
    video_parameters: int
    cross_width: int
    tiled: tuple[int, ...]

    @property
    def width(self) -> int:
        """Channels of one attention layer."""
        return self.heads * self.head_dim

    def attention_flops(self, grid: Grid, batch: int, text_tokens: int) -> float:
        """Of video self-attention in one forward, dense; where there is no cross-attention, text is in it."""
        tokens = math.prod(grid)
        text = 0 if self.cross_width else text_tokens
        return sum(4.0 * batch * self.width * (tokens * factor + text) ** 2 for factor in self.tiled)

    def other_flops(self, grid: Grid, batch: int, text_tokens: int) -> float:
        """Of the linear layers, feed-forward among them, and of cross-attention, for the video tokens."""
        tokens = math.prod(grid)
        return batch * tokens * (2.0 * self.video_parameters + 4.0 * text_tokens * self.cross_width)

    def attention_share(self, grid: Grid, batch: int, text_tokens: int) -> float:
        """Of all FLOPs counted here, those of dense video self-attention, from 0 to 1."""
        attention = self.attention_flops(grid, batch, text_tokens)
        return attention / (attention + self.other_flops(grid, batch, text_tokens))

    def elements(self, grid: Grid, batch: int) -> float:
        """Numbers in the hidden states of all layers, which elementwise operations and norms go through."""
        return float(batch * math.prod(grid) * self.width * len(self.layers))


def count(transformer: torch.nn.Module) -> Costs:
    """The costs of a transformer, whose parameters may be on the meta device.

    Raises:
        ValueError: no family serves it.
    """
    family = require_family(transformer)
    modules = family.video_modules(transformer)
    names = tuple(modules)
    attn: Any = next(iter(modules.values()))
    heads = next(getattr(attn, name) for name in _HEADS if hasattr(attn, name))
    width = getattr(attn, family.query_projection).out_features
    blocks = {_block(name) for name in names}
    not_video = re.compile("|".join(_NOT_VIDEO_OF.get(family.name, _NOT_VIDEO)))
    video, cross = 0, 0
    for name, module in transformer.named_modules():
        if not isinstance(module, torch.nn.Linear) or _block(name) not in blocks or not_video.search(name):
            continue
        video += module.weight.numel()
        if _CROSS.search(name) and name.endswith(("to_q", "to_query")):
            cross += module.out_features
    one = (4, 4, 4)
    tiled = tuple(family.processor_of(transformer, name).tiled_grid(one)[0] // one[0] for name in names)
    parameters = sum(parameter.numel() for parameter in transformer.parameters())
    return Costs(family, names, heads, width // heads, parameters, video, cross, tiled)


def _block(name: str) -> str:
    """The block that a module is in: its name up to the first number."""
    found = re.match(r".*?\.\d+(?=\.|$)", name)
    return found[0] if found else ""
