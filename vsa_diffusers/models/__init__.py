"""The model families. Each is imported when one of its classes is met, so that older diffusers releases work too."""

from __future__ import annotations

import importlib

import torch

from ..processor import FamilyAttnProcessor, VSAAttnProcessor, resolve_attention_with
from .family import Family

__all__ = ["Family", "VSAAttnProcessor", "attention_modules", "find_family", "supported_transformers"]

_MODULE_OF_TRANSFORMER = {
    "WanTransformer3DModel": "wan",
    "WanVACETransformer3DModel": "wan",
    "LTXVideoTransformer3DModel": "ltx",
    "LTX2VideoTransformer3DModel": "ltx2",
    "HunyuanVideoTransformer3DModel": "hunyuan_video",
    "HunyuanVideoFramepackTransformer3DModel": "framepack",
    "HunyuanVideo15Transformer3DModel": "hunyuan_video15",
    "CogVideoXTransformer3DModel": "cogvideox",
    "ConsisIDTransformer3DModel": "cogvideox",
    "MochiTransformer3DModel": "mochi",
    "EasyAnimateTransformer3DModel": "easyanimate",
    "HeliosTransformer3DModel": "helios",
    "MiniMaxH3Transformer3DModel": "minimax_h3",
    "MotifVideoTransformer3DModel": "motif_video",
    "Cosmos3OmniTransformer": "cosmos3",
}
_MODULE_OF_ATTENTION = {
    "WanAttention": "wan",
    "LTXAttention": "ltx",
    "LTX2Attention": "ltx2",
    "MochiAttention": "mochi",
    "HeliosAttention": "helios",
    "MiniMaxH3Attention": "minimax_h3",
    "Cosmos3PackedMoTAttention": "cosmos3",
}


def supported_transformers() -> list[str]:
    """Class names of the transformers that can be served."""
    return sorted(_MODULE_OF_TRANSFORMER)


def find_family(transformer: torch.nn.Module) -> Family | None:
    """The family that serves this transformer, judged by its class and base classes; `None` if there is none."""
    for cls in type(transformer).__mro__:
        if cls.__name__ in _MODULE_OF_TRANSFORMER:
            return importlib.import_module(f".{_MODULE_OF_TRANSFORMER[cls.__name__]}", __name__).FAMILY
    return None


def attention_modules(transformer: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Every module of the transformer that has an attention processor, by name."""
    return {name: module for name, module in transformer.named_modules() if hasattr(module, "processor")}


def _attention_processor(attention: type) -> type[FamilyAttnProcessor] | None:
    name = _MODULE_OF_ATTENTION.get(attention.__name__)
    return importlib.import_module(f".{name}", __name__).FAMILY.processor if name else None


resolve_attention_with(_attention_processor)
