"""What LayerSkip of diffusers, and the guidance methods built on it, have to know of our processors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


def register_processor(processor: type, streams_of: Callable[[torch.nn.Module], Sequence[str]]) -> None:
    """Tell diffusers what a module with this processor returns when LayerSkip skips its attention.

    Args:
        processor: the class.
        streams_of: from the module, the first arguments of its forward, which it returns as they are then.
    """
    from diffusers.hooks._helpers import AttentionProcessorMetadata, AttentionProcessorRegistry

    metadata = AttentionProcessorMetadata(skip_processor_output_fn=_skipped(streams_of))
    AttentionProcessorRegistry.register(processor, metadata)


def why_scores_are_skipped() -> str | None:
    """Why this call is to take its values for its output, if perturbed attention guidance wants that.

    It changes `scaled_dot_product_attention` alone, which dense attention calls and sparse attention does not.
    """
    modes = torch.overrides._get_current_function_mode_stack()
    if not modes:
        return None
    from diffusers.hooks.layer_skip import AttentionScoreSkipFunctionMode

    skips = any(isinstance(mode, AttentionScoreSkipFunctionMode) for mode in modes)
    return "perturbed attention guidance takes its values instead of attention" if skips else None


def _skipped(streams_of: Callable[[torch.nn.Module], Sequence[str]]) -> Callable[..., Any]:
    def output(attn: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        streams = streams_of(attn)
        given = dict(zip(streams, args, strict=False)) | kwargs
        tensors = tuple(given.get(stream) for stream in streams)
        return tensors if len(tensors) > 1 else tensors[0]

    return output
