"""LTX-2: the video stream's self-attention. Text, audio and cross-modal attention stay dense."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.transformers import transformer_ltx2

from ..parallel import Exchange
from ..processor import FamilyAttnProcessor
from .family import NORMED, Family, Grid
from .spread import JOINED, PER_TOKEN, TOKENS, before, tables, video_keys

_ROTATE = {
    "interleaved": transformer_ltx2.apply_interleaved_rotary_emb,
    "split": transformer_ltx2.apply_split_rotary_emb,
}


class LTX2VSAProcessor(FamilyAttnProcessor):
    """Stands in for `LTX2AudioVideoAttnProcessor` and `LTX2PerturbedAttnProcessor`."""

    # Reference and keyframe tokens of the conditioning pipelines follow the video tokens.
    surplus = "after"
    only_video = False
    # The perturbed processor serves unperturbed calls too; diffusers before LTX-2.3 has only the other.
    stock = getattr(transformer_ltx2, "LTX2PerturbedAttnProcessor", transformer_ltx2.LTX2AudioVideoAttnProcessor)

    def __call__(
        self,
        attn: torch.nn.Module,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        query_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        key_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        perturbation_mask: torch.Tensor | None = None,
        all_perturbed: bool | None = None,
    ) -> torch.Tensor:
        perturbation = {"perturbation_mask": perturbation_mask, "all_perturbed": all_perturbed}
        perturbation = {name: value for name, value in perturbation.items() if value is not None}
        not_sparse = encoder_hidden_states is not None or bool(all_perturbed)
        shape = None if not_sparse else self.sparse_shape(hidden_states.shape[1], attention_mask)
        if shape is None:
            rotary = (query_rotary_emb, key_rotary_emb)
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, *rotary, **perturbation)
        query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        query, key = attn.norm_q(query), attn.norm_k(key)
        if query_rotary_emb is not None:
            rotate = _ROTATE[attn.rope_type]
            query = rotate(query, query_rotary_emb)
            key = rotate(key, query_rotary_emb if key_rotary_emb is None else key_rotary_emb)
        heads = (attn.heads, -1)
        query, key, heads_of_value = (x.unflatten(2, heads) for x in (query, key, value))
        output = self.attend(attn, shape, query, key, heads_of_value, hidden_states).flatten(2)
        if perturbation_mask is not None:
            output = torch.lerp(value, output, perturbation_mask)
        if getattr(attn, "to_gate_logits", None) is not None:
            weight = 2 * torch.sigmoid(attn.to_gate_logits(hidden_states))
            output = (output.unflatten(2, heads) * weight.unsqueeze(-1)).flatten(2)
        return attn.to_out[1](attn.to_out[0](output))


def read_grid(transformer: torch.nn.Module, inputs: Mapping[str, Any]) -> Grid | None:
    """The latent extents of the video in patches, or what the coordinates say where a pipeline passes only those."""
    frames, height, width = (inputs.get(name) for name in ("num_frames", "height", "width"))
    if frames is None or height is None or width is None:
        return _leading_grid(inputs["video_coords"][0, :, :, 0])
    patch_t, patch = transformer.config.patch_size_t, transformer.config.patch_size
    return frames // patch_t, height // patch, width // patch


def _leading_grid(starts: torch.Tensor) -> Grid:
    """The grid that coordinates `[3, sequence]` begin with, frame by frame and row by row; any other tokens follow."""
    time, row, _ = starts

    def leading(condition: torch.Tensor) -> int:
        return int(condition.long().cumprod(0).sum())

    area = leading(time == time[0])
    width = leading(row[:area] == row[0])
    frames = time[: len(time) // area * area : area]
    return 1 + leading(frames.diff() > 0), area // width, width


def plan(transformer: torch.nn.Module) -> dict[str, Any]:
    """Per-token inputs are split with the video; audio and text are whole."""
    rope = tables(2, 4) if transformer.config.rope_type == "split" else tables(1, 3)
    levels = {"hidden_states": TOKENS, "timestep": PER_TOKEN}
    if transformer.config.get("use_keyframes_abs_pos_embedding"):
        levels["video_keyframes_mask"] = TOKENS
    return {"": levels, "rope": rope, "proj_out": JOINED}


def parallel_hooks(transformer: torch.nn.Module, exchange: Exchange) -> list[Any]:
    """Audio attends to the video of all ranks, by whole rotary tables; of these, video queries need their part."""
    dim = 2 if transformer.config.rope_type == "split" else 1
    own = {"query_rotary_emb": lambda each, given: tuple(exchange.own(table, dim) for table in each)}
    blocks = transformer.transformer_blocks
    return [
        *before([block.audio_to_video_attn for block in blocks], own),
        *video_keys([block.video_to_audio_attn for block in blocks], exchange, {"encoder_hidden_states": 1}),
    ]


FAMILY = Family(
    name="LTX-2",
    transformers=("LTX2VideoTransformer3DModel",),
    modules=r"transformer_blocks\.\d+\.attn1",
    processor=LTX2VSAProcessor,
    read_grid=read_grid,
    needs=(*NORMED, "rope_type"),
    checkpoints=("Lightricks/LTX-2", "diffusers/LTX-2.3-Diffusers", "Lightricks/LTX-2.5-Diffusers"),
    stays_dense="cross-attention, audio, audio to video and back; reference tokens attend densely",
    foreign_gates=(
        "Gates with one row for each head are LTX-2.3's own gated attention, `to_gate_logits` in diffusers, which "
        "FastVideo calls `to_gate_compress` too; they come with the model and are no gates of VSA."
    ),
    plan=plan,
    parallel_hooks=parallel_hooks,
)
