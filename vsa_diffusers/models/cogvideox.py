"""CogVideoX 1.0 and 1.5, and ConsisID."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models import attention_processor
from diffusers.models._modeling_parallel import ContextParallelInput

from .family import Family, Grid
from .joint import JOINT, JointVSAProcessor, split_heads
from .spread import JOINED, VIDEO


class CogVideoXVSAProcessor(JointVSAProcessor):
    """Stands in for `CogVideoXAttnProcessor2_0`: text before video, and one set of projections for both."""

    text_first = True
    stock = attention_processor.CogVideoXAttnProcessor2_0

    def project(self, attn: torch.nn.Module, hidden: torch.Tensor, *names: str) -> tuple[torch.Tensor, ...]:
        """By the fused projection where the stock processor does: `fuse_qkv_projections` exchanges it."""
        if not isinstance(self.original, attention_processor.FusedCogVideoXAttnProcessor2_0):
            return super().project(attn, hidden, *names)
        query, key, value = attn.to_qkv(hidden).chunk(3, dim=-1)
        return split_heads(attn, query, key, value, attn.norm_q, attn.norm_k)

    def finish(
        self, attn: torch.nn.Module, video: torch.Tensor, text: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Both streams share the output projection, too."""
        video, text = (attn.to_out[1](attn.to_out[0](stream)) for stream in (video, text))
        return video, text


def read_grid(transformer: torch.nn.Module, inputs: Mapping[str, Any]) -> Grid:
    """Grid of `hidden_states` `[batch, frames, channels, height, width]`; only 1.5 has patches of several frames."""
    _, frames, _, height, width = inputs["hidden_states"].shape
    patch, patch_t = transformer.config.patch_size, transformer.config.get("patch_size_t") or 1
    return frames // patch_t, height // patch, width // patch


FAMILY = Family(
    name="CogVideoX",
    transformers=("CogVideoXTransformer3DModel", "ConsisIDTransformer3DModel"),
    modules=r"transformer_blocks\.\d+\.attn1",
    processor=CogVideoXVSAProcessor,
    read_grid=read_grid,
    needs=(*JOINT, "to_out"),
    checkpoints=(
        "THUDM/CogVideoX-2b",
        "THUDM/CogVideoX-5b",
        "THUDM/CogVideoX-5b-I2V",
        "THUDM/CogVideoX1.5-5B",
        "alibaba-pai/CogVideoX-Fun-V1.1-5b-Pose",
        "BestWishYsh/ConsisID-preview",
    ),
    stays_dense="text attends densely; ConsisID's face attention",
    plan={
        "transformer_blocks.0": VIDEO,
        "transformer_blocks.*": {"image_rotary_emb": [ContextParallelInput(split_dim=0, expected_dims=2)] * 2},
        "proj_out": JOINED,
    },
)
