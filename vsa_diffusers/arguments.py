"""What the public op takes: every argument is checked before any work, and refused by name, value and mend."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .tiles import TileGrid, is_real, whole_numbers

COMBINES = ("gate", "sum", "sparse", "merge")
IMPLEMENTATIONS = ("auto", "triton", "torch")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LARGEST_SCALE = torch.finfo(torch.float32).max


def check_choice(name: str, value: str | None, choices: Sequence[str]) -> None:
    """Raise `ValueError` unless `value` is one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(map(repr, choices))}.")


def check_auto_block_size(block_size: str, combine: str | None) -> None:
    """Raise `ValueError` unless a block size given as text is `"auto"` and no gate was trained for another."""
    check_choice("block_size", block_size, ("auto",))
    if combine == "gate":
        raise ValueError(
            'block_size="auto" does not go with combine="gate": gates are trained for one block size; pass that one, '
            "for example (4, 4, 4)."
        )


def check_scale(scale: float | None, head_dim: int) -> float:
    """The factor on the logits, `head_dim**-0.5` if `None`; `ValueError` unless it is finite, and no parameter."""
    if scale is None:
        return head_dim**-0.5
    if isinstance(scale, torch.Tensor) and scale.ndim == 0:
        if scale.requires_grad:
            raise ValueError("scale requires a gradient, but would get none; multiply query by it, and pass scale=1.")
        scale = scale.item()
    if not is_real(scale) or not -LARGEST_SCALE <= scale <= LARGEST_SCALE:
        raise ValueError(f"scale={scale!r} must be a finite number, or None for head_dim**-0.5 = {head_dim**-0.5:.4g}.")
    return float(scale)


def check_tensors(query, key, value, gate, context_mask) -> None:
    """Raise unless query, key, value and gate are of one form that can be served, and the mask is a tensor if given.

    Raises:
        TypeError: something else than a tensor.
        ValueError: another shape, dtype, layout or device.
    """
    optional = ("gate", gate), ("context_mask", context_mask)
    for name, tensor in (("query", query), ("key", key), ("value", value), *optional):
        if not isinstance(tensor, torch.Tensor) and not (tensor is None and name in ("gate", "context_mask")):
            shape = "bool [batch, before + after]" if name == "context_mask" else "[batch, sequence, heads, head_dim]"
            raise TypeError(f"{name} must be a tensor {shape}, not {_told(tensor)}.")
        if tensor is not None and (tensor.layout != torch.strided or tensor.is_nested):
            raise ValueError(
                f"{name}.layout={tensor.layout} is not supported; pass a dense tensor, for example {name}.to_dense()."
            )
    if query.ndim != 4:
        raise ValueError(
            f"query.shape={tuple(query.shape)} must be [batch, sequence, heads, head_dim], the layout diffusers uses."
        )
    for axis, size in zip(("batch", "sequence", "heads", "head_dim"), query.shape, strict=True):
        if size < 1:
            raise ValueError(f"query.shape={tuple(query.shape)} has {axis}=0; each must have at least one element.")
    for name, tensor in (("query", query), ("gate", gate)):
        if tensor is not None and tensor.dtype not in DTYPES:
            raise ValueError(f"{name}.dtype={tensor.dtype} is not supported; use float32, float16 or bfloat16.")
    for name, tensor in (("key", key), ("value", value)):
        for what in ("shape", "dtype", "device"):
            ours, theirs = getattr(query, what), getattr(tensor, what)
            if ours != theirs:
                ours, theirs = (tuple(x) if what == "shape" else x for x in (ours, theirs))
                raise ValueError(
                    f"{name}.{what}={theirs} does not match query.{what}={ours}; query, key and value must all be "
                    "[batch, sequence, heads, head_dim] of one shape, dtype and device."
                )
    if gate is not None and (gate.shape != query.shape or gate.device != query.device):
        raise ValueError(
            f"gate.shape={tuple(gate.shape)} on {gate.device} must equal query.shape={tuple(query.shape)} on "
            f"{query.device}; unflatten the projection into [batch, sequence, heads, head_dim]."
        )


def check_combine(combine: str | None, gate: torch.Tensor | None) -> str:
    """How the branches are combined; `ValueError` unless that goes with the gate, or with none."""
    if combine is None:
        return "sum" if gate is None else "gate"
    check_choice("combine", combine, COMBINES)
    if (combine == "gate") != (gate is not None):
        raise ValueError(
            'combine="gate" needs gate=, a tensor [batch, sequence, heads, head_dim]; pass it, or choose "merge".'
            if gate is None
            else f'gate was given, but combine={combine!r} does not use it; pass combine="gate" or gate=None.'
        )
    return combine


def check_context(
    query: torch.Tensor, video_shape: tuple[int, int, int], context_tokens, context_mask: torch.Tensor | None
) -> tuple[int, int]:
    """Context tokens before and after the video; `ValueError` unless they and the grid make up the sequence."""
    counts = whole_numbers(context_tokens, 2, 0)
    if counts is None:
        raise ValueError(f"context_tokens={context_tokens!r} must be two counts (before, after), for example (0, 256).")
    before, after = counts
    batch, sequence = query.shape[:2]
    tokens = TileGrid(video_shape, (1, 1, 1)).num_tokens
    if before + tokens + after != sequence:
        T, H, W = video_shape
        context = f" plus {before} + {after} context tokens" if before or after else ""
        raise ValueError(
            f"video_shape={video_shape} has {T} * {H} * {W} = {tokens} tokens{context}, but the sequence "
            f"holds {sequence}; pass the grid after patchification, and count all other tokens in context_tokens."
        )
    if context_mask is not None and (
        context_mask.shape != (batch, before + after)
        or context_mask.dtype != torch.bool
        or context_mask.device != query.device
    ):
        raise ValueError(
            f"context_mask of shape {tuple(context_mask.shape)}, {context_mask.dtype} on {context_mask.device} must be "
            f"bool [batch, before + after] = {(batch, before + after)} on {query.device}, True for valid keys."
        )
    return before, after


def _told(value: object) -> str:
    """A value in a message, where it is short enough to be read there."""
    text = repr(value)
    return text if len(text) < 60 else f"a {type(value).__name__}"
