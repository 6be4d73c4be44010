"""Attention modules without surprises: project, normalise, attend, project out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..processor import FamilyAttnProcessor

Projected = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class PlainVSAProcessor(FamilyAttnProcessor):
    """For modules with `to_q`, `to_k`, `to_v`, `heads` (or `num_heads`), and perhaps `norm_q`, `norm_k`, `to_out`.

    Norms are applied to the whole projection or to each head, whichever their weight fits.
    """

    takes_arguments = False
    """Whether `project` knows what to do with further arguments of the call, such as rotary embeddings."""

    @staticmethod
    def project(attn: torch.nn.Module, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Projected:
        """Query, key and value, each `[batch, sequence, heads, head_dim]`."""
        heads = attn.heads if hasattr(attn, "heads") else attn.num_heads
        query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        query, key, value = (x.unflatten(-1, (heads, -1)) for x in (query, key, value))
        return _normalise(attn, "norm_q", query), _normalise(attn, "norm_k", key), value

    def __call__(self, attn: torch.nn.Module, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        given = [argument for argument in (*args, *kwargs.values()) if argument is not None]
        obstacle = None
        if given and not self.takes_arguments:
            obstacle = "the call has more arguments than hidden_states; pass register_transformer a project function"
        shape = self.sparse_shape(hidden_states.shape[1], kwargs.get("attention_mask"), obstacle)
        if shape is None:
            return self.original(attn, hidden_states, *args, **kwargs)
        query, key, value = self.project(attn, hidden_states, *args, **kwargs)
        output = self.attend(attn, shape, query, key, value, hidden_states).flatten(2)
        out = getattr(attn, "to_out", None) or ()
        for layer in out if isinstance(out, (torch.nn.ModuleList, tuple)) else (out,):
            output = layer(output)
        return output


def plain_processor(project: Callable[..., Projected] | None) -> type[PlainVSAProcessor]:
    """`PlainVSAProcessor`, with another `project` if one is given."""
    if project is None:
        return PlainVSAProcessor
    return type("PlainVSAProcessor", (PlainVSAProcessor,), {"project": staticmethod(project), "takes_arguments": True})


def _normalise(attn: torch.nn.Module, name: str, heads: torch.Tensor) -> torch.Tensor:
    norm = getattr(attn, name, None)
    if norm is None:
        return heads
    weight = getattr(norm, "weight", None)
    over_all_heads = weight is not None and weight.shape[-1] != heads.shape[-1]
    return norm(heads.flatten(2)).view_as(heads) if over_all_heads else norm(heads)
