"""The model families. Each is imported when one of its classes is met, so that older diffusers releases work too."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable
from typing import Any

import torch

from ..processor import FamilyAttnProcessor
from .family import Family, ReadGrid
from .plain import plain_processor

__all__ = [
    "REFUSED",
    "Family",
    "attention_modules",
    "attention_processor",
    "dense_attention",
    "find_family",
    "known_families",
    "refusal",
    "register_transformer",
    "require_family",
    "supported_transformers",
]

_MODULE_OF_TRANSFORMER = {
    "AllegroTransformer3DModel": "allegro",
    "AnyFlowTransformer3DModel": "anyflow",
    "ChronoEditTransformer3DModel": "chronoedit",
    "CogVideoXTransformer3DModel": "cogvideox",
    "ConsisIDTransformer3DModel": "cogvideox",
    "Cosmos3OmniTransformer": "cosmos3",
    "CosmosControlNetModel": "cosmos",
    "CosmosTransformer3DModel": "cosmos",
    "EasyAnimateTransformer3DModel": "easyanimate",
    "HeliosTransformer3DModel": "helios",
    "HunyuanVideo15Transformer3DModel": "hunyuan_video15",
    "HunyuanVideoFramepackTransformer3DModel": "framepack",
    "HunyuanVideoTransformer3DModel": "hunyuan_video",
    "Kandinsky5Transformer3DModel": "kandinsky5",
    "Kandinsky6Transformer3DModel": "kandinsky6",
    "LTX2VideoTransformer3DModel": "ltx2",
    "LTXVideoTransformer3DModel": "ltx",
    "MiniMaxH3Transformer3DModel": "minimax_h3",
    "MochiTransformer3DModel": "mochi",
    "MotifVideoTransformer3DModel": "motif_video",
    "SkyReelsV2Transformer3DModel": "skyreels_v2",
    "WanAnimateTransformer3DModel": "wan_animate",
    "WanTransformer3DModel": "wan",
    "WanVACETransformer3DModel": "wan",
}
# Attention classes that only one arithmetic uses; `Attention`, which many families share, is not among them.
_MODULE_OF_ATTENTION = {
    "AnyFlowAttention": "anyflow",
    "Cosmos3PackedMoTAttention": "cosmos3",
    "HeliosAttention": "helios",
    "Kandinsky5Attention": "kandinsky5",
    "Kandinsky6Attention": "kandinsky6",
    "LTX2Attention": "ltx2",
    "LTXAttention": "ltx",
    "MiniMaxH3Attention": "minimax_h3",
    "MochiAttention": "mochi",
    "MotifVideoAttention": "motif_video",
    "SkyReelsV2Attention": "wan",
    "WanAttention": "wan",
}
# Attention classes of supported transformers that are never video self-attention.
_DENSE_ATTENTION = ("MotifVideoCrossAttention", "WanAnimateFaceBlockCrossAttention")

REFUSED = {
    "AnyFlowFARTransformer3DModel": (
        "it generates chunk by chunk with a causal mask and a key-value cache, which VSA does not cover"
    ),
    "Kandinsky6SRTransformer3DModel": (
        "its self-attention is sparse already (nabla), over tokens that it has put into an order of its own"
    ),
    "LatteTransformer3DModel": (
        "its attention is split into spatial and temporal layers, so that no layer attends over the 3D grid"
    ),
    "SanaVideoTransformer3DModel": (
        "its self-attention is linear attention, which has neither scores to select by nor a quadratic cost to save"
    ),
    "SanaWMLTX2RefinerTransformer3DModel": (
        "it refines window by window with a key-value cache, which VSA does not cover"
    ),
    "SanaWMTransformer3DModel": (
        "its self-attention is a linear recurrence in most layers, which has neither scores to select by nor a "
        "quadratic cost to save, and shares the others with a camera branch"
    ),
    "WanAnimate2Transformer3DModel": (
        "its queries attend to cached reference tokens through a block mask, which VSA does not cover"
    ),
}
"""Class names of video transformers that VSA does not fit, each with the reason."""

_registered: dict[type | str, Family] = {}


def register_transformer(
    transformer: type[torch.nn.Module] | str,
    modules: str,
    video_shape: ReadGrid | None = None,
    *,
    project: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]] | None = None,
    processor: type[FamilyAttnProcessor] | None = None,
) -> None:
    """Teach `enable_vsa`, `add_gate_compress` and the rest a video transformer that they do not know.

        register_transformer(MyTransformer, "blocks.*.attn", lambda model, inputs: inputs["video"].shape[-3:])

    Attention modules with a `processor`, as diffusers writes them, get a sparse one. Other modules get it in front of
    their `forward`, which keeps serving the dense calls. Registering a class again replaces what was known of it.

    Args:
        transformer: the class, or its name; subclasses are served too.
        modules: names of the video self-attention modules, where `*` stands for one part between dots.
        video_shape: from the transformer and its forward's arguments by name, the grid `(T, H, W)` after
            patchification, or `None` where they do not tell. Without it, `enable_vsa` needs its `video_shape=`.
        project: `project(attn, hidden_states, *args, **kwargs)` returns query, key and value, each
            `[batch, sequence, heads, head_dim]`, normalised and rotated. It gets whatever the module is called with.
            `None` serves modules that are called with `hidden_states` alone and have `to_q`, `to_k`, `to_v`, `heads`
            (or `num_heads`) and, if need be, `norm_q`, `norm_k`. Afterwards `to_out` is applied, if there is one.
        processor: a whole attention processor, instead of `project`, for modules that finish in another way.

    Raises:
        ValueError: both `project` and `processor` are given, or a name or pattern can match nothing.
        TypeError: an argument is not what is described above.
    """
    _check_transformer(transformer)
    _check_modules(modules)
    _check_function("video_shape", video_shape, "video_shape(transformer, inputs) that returns (T, H, W)")
    _check_function("project", project, "project(attn, hidden_states, ...) that returns query, key and value", True)
    if processor is not None:
        _check_processor(processor)
    if project is not None and processor is not None:
        raise ValueError("project= and processor= were both given; a processor projects by itself, so pass only one.")
    name = transformer if isinstance(transformer, str) else transformer.__name__
    _registered[transformer] = Family(
        name=name,
        transformers=(name,),
        modules=re.escape(modules).replace(r"\*", r"[^.]+"),
        processor=processor or plain_processor(project),
        read_grid=video_shape or (lambda transformer, inputs: None),
        needs=(),
    )


def _check_transformer(transformer: Any) -> None:
    if isinstance(transformer, str):
        if not transformer.isidentifier():
            raise ValueError(
                f"transformer={transformer!r} is not the name of a class; pass the class, or its name without the "
                'module, such as "MyTransformer".'
            )
    elif not isinstance(transformer, type) or not issubclass(transformer, torch.nn.Module):
        what = type(transformer).__name__ if isinstance(transformer, torch.nn.Module) else repr(transformer)
        raise TypeError(f"transformer={what} must be a class of torch.nn.Module, or its name; pass type(transformer).")


def _check_modules(modules: Any) -> None:
    if not isinstance(modules, str):
        raise TypeError(f"modules={modules!r} must be one pattern of module names, such as 'layers.*.attn'.")
    if not all(re.fullmatch(r"[^\s,\[\]]+", part) for part in modules.split(".")):
        raise ValueError(
            f"modules={modules!r} can match no module; name them as named_modules() does, with * for one part between "
            "dots, such as 'layers.*.attn'."
        )


def _check_function(name: str, function: Any, what: str, and_more: bool = False) -> None:
    """Raise `TypeError` unless `function` is `None` or takes two arguments, `and_more` where it says so."""
    if function is None:
        return
    if not callable(function):
        raise TypeError(f"{name}={function!r} must be a function {what}.")
    try:
        signature = inspect.signature(function)
    except ValueError:  # not every function tells its signature
        return
    try:
        (signature.bind_partial if and_more else signature.bind)(None, None)
    except TypeError:
        raise TypeError(f"{name}={function!r} takes {signature}; it must be a function {what}.") from None


def _check_processor(processor: Any) -> None:
    is_family = isinstance(processor, type) and issubclass(processor, FamilyAttnProcessor)
    if not is_family or not any("__call__" in vars(cls) for cls in processor.__mro__):
        raise TypeError(
            f"processor={processor!r} must be a class, not an instance, that derives from FamilyAttnProcessor of "
            "vsa_diffusers.processor and has a __call__."
        )


def known_families() -> list[Family]:
    """The built-in families, in alphabetical order; imports them all."""
    return [_family(module) for module in sorted(set(_MODULE_OF_TRANSFORMER.values()))]


def supported_transformers() -> list[str]:
    """Class names of the transformers that can be served."""
    registered = {name for family in _registered.values() for name in family.transformers}
    return sorted({*_MODULE_OF_TRANSFORMER, *registered})


def find_family(transformer: torch.nn.Module) -> Family | None:
    """The family that serves this transformer, judged by its class and base classes; `None` if there is none."""
    for cls in type(transformer).__mro__:
        family = _registered.get(cls) or _registered.get(cls.__name__)
        if family is not None:
            return family
        if cls.__name__ in _MODULE_OF_TRANSFORMER:
            return _family(_MODULE_OF_TRANSFORMER[cls.__name__])
    return None


def require_family(transformer: torch.nn.Module) -> Family:
    """The family that serves this transformer.

    Raises:
        ValueError: there is none; the message gives the reason if the class is known not to fit.
    """
    family = find_family(transformer)
    if family is None:
        raise ValueError(
            refusal(transformer)
            or f"transformer={type(transformer).__name__} is not a supported video transformer; supported are: "
            f"{', '.join(supported_transformers())}. Pass pipe.transformer, not the pipeline, or teach your own class "
            "with register_transformer."
        )
    return family


def refusal(transformer: torch.nn.Module) -> str | None:
    """Why this transformer cannot be served, if its class is one of those that VSA does not fit."""
    for cls in type(transformer).__mro__:
        if cls.__name__ in REFUSED:
            return f"{cls.__name__} cannot use Video Sparse Attention: {REFUSED[cls.__name__]}."
    return None


def attention_modules(transformer: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Every module of the transformer that has an attention processor, by name."""
    return {name: module for name, module in transformer.named_modules() if hasattr(module, "processor")}


def attention_processor(attention: type) -> type[FamilyAttnProcessor] | None:
    """The processor that serves an attention class, where the class alone tells."""
    module = _MODULE_OF_ATTENTION.get(attention.__name__)
    return _family(module).processor if module else None


def dense_attention(attn: torch.nn.Module) -> Any:
    """A stock processor for a module whose class is never video self-attention; `None` for other classes."""
    return type(attn)._default_processor_cls() if type(attn).__name__ in _DENSE_ATTENTION else None


def _family(module: str) -> Family:
    return importlib.import_module(f".{module}", __name__).FAMILY
