"""LTX-Video 0.9.x."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.transformers import transformer_ltx

from ..processor import FamilyAttnProcessor
from .family import NORMED, Family, Grid
from .spread import JOINED, PER_TOKEN, TOKENS, tables


class LTXVSAProcessor(FamilyAttnProcessor):
    """Stands in for `LTXVideoAttnProcessor`."""

    stock = transformer_ltx.LTXVideoAttnProcessor

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
        query, key = attn.norm_q(query), attn.norm_k(key)
        if image_rotary_emb is not None:
            query = transformer_ltx.apply_rotary_emb(query, image_rotary_emb)
            key = transformer_ltx.apply_rotary_emb(key, image_rotary_emb)
        query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in (query, key, value))
        output = self.attend(attn, shape, query, key, value, hidden_states).flatten(2)
        return attn.to_out[1](attn.to_out[0](output))


def read_grid(transformer: torch.nn.Module, inputs: Mapping[str, Any]) -> Grid | None:
    """The latent extents, or the number of different coordinates where pipelines pass those instead.

    The conditioning pipelines add whole latent frames before or after the video's; they count as frames of the grid.
    """
    tokens = inputs["hidden_states"].shape[1]
    coordinates = inputs.get("video_coords")
    if coordinates is None:
        return inputs["num_frames"], inputs["height"], inputs["width"]
    height, width = (axis.unique().numel() for axis in coordinates[0, 1:])
    return (tokens // (height * width), height, width) if tokens % (height * width) == 0 else None


FAMILY = Family(
    name="LTX-Video",
    transformers=("LTXVideoTransformer3DModel",),
    modules=r"transformer_blocks\.\d+\.attn1",
    processor=LTXVSAProcessor,
    read_grid=read_grid,
    needs=NORMED,
    checkpoints=("Lightricks/LTX-Video", "Lightricks/LTX-Video-0.9.5"),
    plan={"": {"hidden_states": TOKENS, "timestep": PER_TOKEN}, "rope": tables(1, 3), "proj_out": JOINED},
)
