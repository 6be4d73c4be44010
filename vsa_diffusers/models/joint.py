"""What the families with joint attention share: one softmax over a video stream and a text stream."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb

from ..processor import FamilyAttnProcessor
from .family import Grid

JOINT = ("processor", "heads", "to_q", "to_k", "to_v", "norm_q", "norm_k", "add_q_proj")
"""What joint attention modules have, and their processors use."""
PROJECTIONS = ("to_q", "to_k", "to_v", "norm_q", "norm_k")
TEXT_PROJECTIONS = ("add_q_proj", "add_k_proj", "add_v_proj", "norm_added_q", "norm_added_k")


class JointVSAProcessor(FamilyAttnProcessor):
    """Attention over `[video | text]`, or `[text | video]`, with one set of projections or one per stream.

    Calls have the signature that diffusers gives joint attention; they return the video and the text stream.
    """

    streams = ("hidden_states", "encoder_hidden_states")
    text_first = False
    text_mask: Callable[[torch.Tensor, int], torch.Tensor] | None = None
    """From the call's mask and the text's length, bool `[batch, text]`, False where text is padding. Where a family
    has none, a mask makes the call dense."""

    def __call__(
        self,
        attn: torch.nn.Module,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        length = encoder_hidden_states.shape[1]
        read_mask = None if attention_mask is None else self.text_mask
        text_mask = None if read_mask is None else read_mask(attention_mask, length)
        shape = self.sparse_shape(hidden_states.shape[1], attention_mask if read_mask is None else None)
        if shape is None:
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        if attn.add_q_proj is None:
            # Joined before, as in the stock processors: a hook on the projection sees both streams at once.
            query, key, value = self.project(attn, self.join(hidden_states, encoder_hidden_states), *PROJECTIONS)
            (query, text_query), (key, text_key) = self.split(query, length), self.split(key, length)
        else:
            query, key, value = self.project(attn, hidden_states, *PROJECTIONS)
            text_query, text_key, text_value = self.project(attn, encoder_hidden_states, *TEXT_PROJECTIONS)
            value = self.join(value, text_value)
        if image_rotary_emb is not None:
            query, key = self.rotate(query, image_rotary_emb), self.rotate(key, image_rotary_emb)
        query, key = self.join(query, text_query), self.join(key, text_key)
        around = (length, 0) if self.text_first else (0, length)
        output = self.attend(attn, shape, query, key, value, hidden_states, text=around, text_mask=text_mask).flatten(2)
        return self.finish(attn, *self.split(output, length))

    def join(self, video: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """Both streams in one sequence."""
        return torch.cat([text, video] if self.text_first else [video, text], 1)

    def split(self, joined: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The video and the text stream, of which the latter has this length."""
        end = length if self.text_first else joined.shape[1] - length
        first, second = joined[:, :end], joined[:, end:]
        return (second, first) if self.text_first else (first, second)

    def project(self, attn: torch.nn.Module, hidden: torch.Tensor, *names: str) -> tuple[torch.Tensor, ...]:
        """Query, key and value `[batch, sequence, heads, head_dim]`, normalised where `attn` has the norms."""
        to_query, to_key, to_value, *norms = (getattr(attn, name) for name in names)
        return split_heads(attn, to_query(hidden), to_key(hidden), to_value(hidden), *norms)

    def rotate(self, x: torch.Tensor, rotary: Any) -> torch.Tensor:
        """Rotary embedding of the video stream `[batch, sequence, heads, head_dim]`."""
        return apply_rotary_emb(x, rotary, sequence_dim=1)

    def finish(
        self, attn: torch.nn.Module, video: torch.Tensor, text: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Output projections; single-stream blocks have none, since the block projects."""
        if getattr(attn, "to_out", None) is not None:
            video = attn.to_out[1](attn.to_out[0](video))
        if getattr(attn, "to_add_out", None) is not None:
            text = attn.to_add_out(text)
        return video, text


def text_of_key_mask(attention_mask: torch.Tensor, length: int) -> torch.Tensor:
    """The text's part of a key mask `[batch, 1, 1, video + text]`."""
    return attention_mask[:, 0, 0, -length:]


def text_of_text_mask(attention_mask: torch.Tensor, length: int) -> torch.Tensor:
    """The text's own mask `[batch, text]`."""
    return attention_mask.bool()


def split_heads(
    attn: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, norm_query: Any, norm_key: Any
) -> tuple[torch.Tensor, ...]:
    """Projections as `[batch, sequence, heads, head_dim]`, normalised where there are norms."""
    query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in (query, key, value))
    query = query if norm_query is None else norm_query(query)
    key = key if norm_key is None else norm_key(key)
    return query, key, value


def square_patch_grid(transformer: torch.nn.Module, inputs: Mapping[str, Any]) -> Grid:
    """Grid of `[batch, channels, frames, height, width]` cut into `config.patch_size` and, if set, `patch_size_t`."""
    frames, height, width = inputs["hidden_states"].shape[-3:]
    patch, patch_t = transformer.config.patch_size, transformer.config.get("patch_size_t") or 1
    return frames // patch_t, height // patch, width // patch
