"""`VSAAttnProcessor`: Video Sparse Attention through diffusers' own `set_attn_processor`."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from .config import VSAConfig, make_config, module_configs
from .layer_skip import register_processor
from .models import attention_modules, attention_processor, dense_attention, find_family, require_family
from .processor import FamilyAttnProcessor, dense_gate_configs, dense_processor, settle_choices
from .running import ForwardHooks, calling_transformer
from .wording import as_arguments, settings

_OURS = "_vsa_processor"


class VSAAttnProcessor:
    """Video Sparse Attention for `transformer.set_attn_processor`, one instance for all modules or one per module.

    Video self-attention becomes sparse; cross-attention and audio run the model's stock processor. The video shape is
    read from the transformer's inputs at every call, as `enable_vsa` does. One instance learns at its first call what
    transformer it serves, so that call must not be compiled: `for_transformer` knows it from the start.

    Args:
        config: a `VSAConfig`; `fields` (such as `top_k_ratio=0.2`) are its fields. `video_shape` overrides what the
            inputs say. Those that need to know the whole transformer (`dense_steps`, `dense_layers`, `modules`, a
            `schedule`) cannot be given.

    Raises:
        ValueError: a field is wrong; when called, tokens do not match `video_shape`, or there is none, and no supported
            transformer makes the call.
    """

    def __init__(self, config: VSAConfig | None = None, **fields: Any):
        self.config = _constant(make_config(config, fields))
        unset = {"dense_steps": 0, "dense_layers": (), "modules": None, "schedule": "constant"}
        _refuse(self.config, unset, "VSAAttnProcessor")
        register_processor(type(self), lambda attn: (attention_processor(type(attn)) or FamilyAttnProcessor).streams)
        self._dense_settings: dict[str, Any] = {"_attention_backend": None, "_parallel_config": None}
        # Modules keep them; this object must not keep the modules.
        self._processors: weakref.WeakSet[Any] = weakref.WeakSet()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({as_arguments(settings(self.config))})"

    @classmethod
    def for_transformer(
        cls, transformer: torch.nn.Module, config: VSAConfig | None = None, **fields: Any
    ) -> dict[str, Any]:
        """Processors for every attention module of `transformer`, as `set_attn_processor` takes them.

        Works for every supported family: video self-attention gets a processor of its family, and all other modules
        keep the processor that they have.

            transformer.set_attn_processor(VSAAttnProcessor.for_transformer(transformer, top_k_ratio=0.2))

        Transformers without `set_attn_processor` (Cosmos, Allegro, AnyFlow) take each as `module.processor`, or
        `enable_vsa`. The transformer gets hooks that read the video shape, which leave once the processors are gone.

        Args:
            transformer: a supported video transformer.
            config: a `VSAConfig`; `fields` are its fields.

        Returns:
            Processors under the names of `transformer.attn_processors`, such as "blocks.0.attn1.processor".

        Raises:
            ValueError: the transformer is not supported, or a field is wrong.
        """
        config = _constant(make_config(config, fields))
        family = require_family(transformer)
        modules = attention_modules(transformer)
        video = list(family.video_modules(transformer))
        if not modules.keys() >= set(video):
            raise ValueError(
                f"{type(transformer).__name__} has video self-attention without a processor; use enable_vsa()."
            )
        configs = module_configs(config, video, [name for name in modules if name not in video])
        # The processors of an enabled VSA give way to those that they stand in for.
        processors = {name: dense_processor(attn.processor, attn) for name, attn in modules.items()}
        hooks = ForwardHooks(transformer, family, leave=True)
        settled = {name: settle_choices(each, modules[name], name) for name, each in configs.items()}
        dense = dense_gate_configs(config, configs, settled, {name: modules[name] for name in video})
        for name, each in (settled | dense).items():
            make = family.processor_of(transformer, name)
            strict = each.video_shape is not None
            state = hooks.state_for(each, make.tiled_grid, name in dense)
            processors[name] = make(each, processors[name], state, name, strict)
            processors[name].stays_dense = name in dense
            hooks.watch(name, modules[name], processors[name], configs.get(name, each))
        hooks.register_alone()
        return {f"{name}.processor": processor for name, processor in processors.items()}

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
        for processor in self._processors:
            setattr(processor, name, value)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_processors": list(self._processors)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _processors=weakref.WeakSet(state["_processors"]))

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
        processor = self._processor_of(attn)
        return processor(attn, hidden_states, encoder_hidden_states, attention_mask, *rotary_embeddings, **kwargs)

    def dense_processor(self, attn: torch.nn.Module) -> Any:
        """What serves the module's dense calls."""
        served = getattr(attn, _OURS, None)
        if served is not None and served.owner is self:
            return dense_processor(served.processor, attn)
        return dense_attention(attn) or _family_processor(attn).stock()

    def _processor_of(self, attn: torch.nn.Module) -> Any:
        """The processor that serves a module; it lives with the module, so that this object keeps none alive."""
        served = getattr(attn, _OURS, None)
        if served is None or served.owner is not self:
            self._serve(attn)
            served = getattr(attn, _OURS)
        return served.processor

    def _serve(self, attn: torch.nn.Module) -> None:
        found = None
        # Compiled code cannot look at its callers.
        if not torch.compiler.is_compiling():
            found = calling_transformer(lambda module: find_family(module) is not None)
        if found is not None:
            self._serve_all(found[0])
        if getattr(attn, _OURS, None) is None or getattr(attn, _OURS).owner is not self:
            if self.config.video_shape is None:
                raise ValueError(
                    f"VSAAttnProcessor cannot tell what grid {type(attn).__name__} attends over, since no supported "
                    "transformer was seen calling it; call the transformer once uncompiled, use "
                    "VSAAttnProcessor.for_transformer(transformer, ...), or pass video_shape=."
                )
            self._put(attn, dense_attention(attn) or _family_processor(attn).stand_in(self.config, attn))

    def _serve_all(self, transformer: torch.nn.Module) -> None:
        """Make the processors of all modules of a transformer that have this one."""
        family = require_family(transformer)
        video = family.video_modules(transformer)
        hooks = ForwardHooks.set_by_hand(transformer, family)
        for name, attn in attention_modules(transformer).items():
            if attn.processor is not self:
                continue
            processor = dense_attention(attn)
            if processor is None:
                make = _family_processor(attn)
                if name in video:
                    make = family.processor_of(transformer, name)
                config = settle_choices(self.config, attn, name)
                state = hooks.state_for(config, make.tiled_grid)
                processor = make(config, make.stock(), state, name, strict=config.video_shape is not None)
                processor.is_video = name in video
                hooks.watch(name, attn, processor, self.config)
            self._put(attn, processor)
        parallel = getattr(transformer, "_parallel_config", None)
        if parallel is not None and self._parallel_config is None:
            self._parallel_config = parallel
        hooks.were_in_place = True
        family.prepare(transformer)

    def _put(self, attn: torch.nn.Module, processor: Any) -> None:
        if isinstance(processor, FamilyAttnProcessor):
            processor.owner = self
        for name, value in self._dense_settings.items():
            if value is not None:
                setattr(processor, name, value)
        self._processors.add(processor)
        setattr(attn, _OURS, _Served(self, processor))


@dataclass
class _Served:
    """What `VSAAttnProcessor` leaves on a module: the processor that it made for it."""

    owner: VSAAttnProcessor
    processor: Any


def _family_processor(attn: torch.nn.Module) -> type[FamilyAttnProcessor]:
    processor = attention_processor(type(attn))
    if processor is None:
        raise ValueError(
            f"attn={type(attn).__name__} does not tell VSAAttnProcessor which model family it serves: the class is "
            "unknown, or shared by several families. Use enable_vsa(pipe), or transformer.set_attn_processor("
            "VSAAttnProcessor.for_transformer(transformer, ...))."
        )
    return processor


def _constant(config: VSAConfig) -> VSAConfig:
    """Processors that are set one by one keep one ratio, unless a schedule was asked for."""
    return replace(config, schedule="constant") if config.schedule == "auto" else config


def _refuse(config: VSAConfig, defaults: Mapping[str, Any], what: str) -> None:
    given = [name for name, default in defaults.items() if getattr(config, name) != default]
    if given:
        raise ValueError(f"{what} cannot serve {', '.join(given)}; use enable_vsa(pipe, ...).")
