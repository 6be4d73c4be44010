"""Attention processors: what every family shares, and `VSAAttnProcessor` for `set_attn_processor`."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from .attention import video_sparse_attention
from .config import VSAConfig, make_config
from .tiles import check_video_shape

logger = logging.getLogger(__name__)


class VideoState:
    """What the transformer's pre-hook learned about the forward that is running; shared by its processors."""

    def __init__(self, video_shape: tuple[int, int, int] | None = None, dense_step: bool = False):
        self.video_shape = video_shape
        self.dense_step = dense_step


class FamilyAttnProcessor:
    """Base of one small processor per attention shape. Subclasses project, call `attend`, and finish.

    Args:
        config: with `combine` settled (not "auto").
        original: the processor that this one stands in for; it serves every call that must be dense.
        state: the video shape of the running forward.
        name: the attention module's name, for messages.
        strict: raise if the tokens do not match the video shape; otherwise run dense.
    """

    stock: type
    """The processor that diffusers gives such a module, able to serve every call to its class."""
    __call__: Callable[..., Any]
    surplus: str | None = None
    """Where tokens beyond the grid sit in this family's video stream: "before", "after", or None if there are none."""

    def __init__(self, config: VSAConfig, original: Any, state: VideoState, name: str = "", strict: bool = False):
        self.config = config
        self.original = original
        self.state = state
        self.name = name
        self.strict = strict
        self._logged: set[str] = set()

    @classmethod
    def stand_in(cls, config: VSAConfig, attn: torch.nn.Module, state: VideoState) -> FamilyAttnProcessor:
        """For a module whose place in the transformer is unknown: only the number of tokens tells that it is video."""
        processor = cls(settle_combine(config, attn), cls.stock(), state, strict=cls.surplus is None)
        processor.surplus = None
        return processor

    # diffusers sets these two on every processor that has them; they belong to the dense attention.
    @property
    def _attention_backend(self) -> Any:
        return getattr(self.original, "_attention_backend", None)

    @_attention_backend.setter
    def _attention_backend(self, backend: Any) -> None:
        self.original._attention_backend = backend

    @property
    def _parallel_config(self) -> Any:
        return getattr(self.original, "_parallel_config", None)

    @_parallel_config.setter
    def _parallel_config(self, config: Any) -> None:
        self.original._parallel_config = config

    def sparse_shape(self, sequence: int, attention_mask: torch.Tensor | None) -> tuple[int, int, int] | None:
        """The video shape if this call can be sparse. If it cannot, `None`, and the reason is logged, once per reason.

        Args:
            sequence: number of tokens in the video stream, without a text stream that `attend` gets as `text`.
            attention_mask: the call's mask, unless it becomes the `text_mask` of `attend`.

        Raises:
            ValueError: the user's own `video_shape` does not match the `sequence` tokens.
        """
        reason = self._why_dense(sequence, attention_mask)
        if reason is None:
            return self.state.video_shape
        if not torch.compiler.is_compiling() and reason not in self._logged:
            self._logged.add(reason)
            level = logging.INFO if self.state.dense_step else logging.WARNING
            logger.log(level, "%s runs dense: %s.", self.name or "attention", reason)
        return None

    def _why_dense(self, sequence: int, attention_mask: torch.Tensor | None) -> str | None:
        if self.state.dense_step:
            return "this denoising step is one of dense_steps"
        if attention_mask is not None:
            return "the call has an attention mask"
        if self._parallel_config is not None:
            return "context parallelism splits the sequence"
        shape = self.state.video_shape
        if shape is None:
            return "the video shape could not be read from the transformer's inputs; pass video_shape="
        tokens = math.prod(shape)
        if tokens == sequence or (tokens < sequence and self.surplus is not None):
            return None
        mismatch = f"video_shape={shape} has {tokens} tokens, but the attention sees {sequence}"
        if self.strict:
            raise ValueError(
                f"{self.name or 'attention'}: {mismatch}; pass the (T, H, W) grid after patchification, or leave "
                "video_shape out of enable_vsa(), which then reads it from the transformer's inputs."
            )
        return mismatch

    def attend(
        self,
        attn: torch.nn.Module,
        shape: tuple[int, int, int],
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        hidden: torch.Tensor,
        text: tuple[int, int] = (0, 0),
        text_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Sparse attention of `[batch, sequence, heads, head_dim]`; the gate, if any, is projected from `hidden`.

        Args:
            hidden: the video stream `[batch, sequence without text, channels]`, surplus tokens included.
            text: number of text tokens before and after the video stream in `query`, `key` and `value`.
            text_mask: bool `[batch, sum(text)]`, False where text is padding.
        """
        before, after = text
        surplus = query.shape[1] - math.prod(shape) - before - after
        gate = None
        if self.config.combine == "gate":
            gate = attn.to_gate_compress(hidden).unflatten(-1, query.shape[2:])
            if gate.shape != query.shape:
                gate = F.pad(gate, (0, 0, 0, 0, before, query.shape[1] - before - gate.shape[1]))
        if surplus and text_mask is not None:
            text_mask = torch.cat(
                [text_mask[:, :before], text_mask.new_ones(len(text_mask), surplus), text_mask[:, before:]], 1
            )
        return video_sparse_attention(
            query,
            key,
            value,
            shape,
            top_k_ratio=self.config.top_k_ratio,
            top_k=self.config.top_k,
            block_size=self.config.block_size,
            gate=gate,
            combine=self.config.combine,
            context_tokens=(before + surplus, after) if self.surplus == "before" else (before, after + surplus),
            context_mask=text_mask,
            implementation=self.config.implementation,
        )


def settle_combine(config: VSAConfig, attn: torch.nn.Module, name: str = "") -> VSAConfig:
    """Settle `combine="auto"` for one attention module; looks at the gate's values, so call it outside of the loop.

    Raises:
        ValueError: `combine="gate"`, and the module has no `to_gate_compress`.
    """
    gate = getattr(attn, "to_gate_compress", None)
    if config.combine == "gate" and gate is None:
        raise ValueError(
            f'combine="gate" needs gates, but {name or type(attn).__name__} has no to_gate_compress; load trained ones '
            'with load_gates(transformer, path), add new ones with add_gate_compress(transformer), or use "merge".'
        )
    if config.combine != "auto":
        return config
    trained = gate is not None and any(bool(p.detach().any()) for p in gate.parameters())
    return replace(config, combine="gate" if trained else "merge")


_resolvers: list[Callable[[type], type[FamilyAttnProcessor] | None]] = []


def resolve_attention_with(resolver: Callable[[type], type[FamilyAttnProcessor] | None]) -> None:
    """Let `VSAAttnProcessor` ask `resolver` which family processor serves an attention class."""
    _resolvers.append(resolver)


class VSAAttnProcessor:
    """Video Sparse Attention for `transformer.set_attn_processor`, one instance for all modules or one per module.

    Video self-attention becomes sparse; cross-attention and audio run the model's stock processor. The video shape is
    fixed: `enable_vsa` is the way to have it read from the transformer's inputs. In LTX-2, whose audio layers use the
    same class as its video layers, the number of tokens tells them apart.

    Args:
        config: a `VSAConfig`; `fields` (such as `top_k_ratio=0.2, video_shape=(21, 30, 52)`) are its fields.

    Raises:
        ValueError: `video_shape` is missing, or a field is wrong; when called, tokens do not match `video_shape`, or
            the attention class is not supported.
    """

    def __init__(self, config: VSAConfig | None = None, **fields: Any):
        self.config = make_config(config, fields)
        self.state = VideoState(check_video_shape(self.config.video_shape))
        self._per_module: dict[torch.nn.Module, FamilyAttnProcessor] = {}
        self._dense_settings: dict[str, Any] = {"_attention_backend": None, "_parallel_config": None}

    @property
    def _attention_backend(self) -> Any:
        return self._dense_settings["_attention_backend"]

    @_attention_backend.setter
    def _attention_backend(self, backend: Any) -> None:
        self._set_dense("_attention_backend", backend)

    @property
    def _parallel_config(self) -> Any:
        return self._dense_settings["_parallel_config"]

    @_parallel_config.setter
    def _parallel_config(self, config: Any) -> None:
        self._set_dense("_parallel_config", config)

    def _set_dense(self, name: str, value: Any) -> None:
        self._dense_settings[name] = value
        for processor in self._per_module.values():
            setattr(processor, name, value)

    def __call__(
        self,
        attn: torch.nn.Module,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        *rotary_embeddings: Any,
        perturbation_mask: torch.Tensor | None = None,
        all_perturbed: bool | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        # LTX-2 passes on only the keyword arguments that it finds named in this signature.
        perturbation = {"perturbation_mask": perturbation_mask, "all_perturbed": all_perturbed}
        kwargs |= {name: value for name, value in perturbation.items() if value is not None}
        processor = self._per_module.get(attn) or self._add(attn)
        return processor(attn, hidden_states, encoder_hidden_states, attention_mask, *rotary_embeddings, **kwargs)

    def _add(self, attn: torch.nn.Module) -> FamilyAttnProcessor:
        family_processor = next(filter(None, (resolver(type(attn)) for resolver in _resolvers)), None)
        if family_processor is None:
            raise ValueError(
                f"attn={type(attn).__name__} is not an attention class that VSAAttnProcessor knows; use "
                "enable_vsa(pipe), or set processors for the video self-attention modules only."
            )
        processor = family_processor.stand_in(self.config, attn, self.state)
        for name, value in self._dense_settings.items():
            setattr(processor, name, value)
        self._per_module[attn] = processor
        return processor
