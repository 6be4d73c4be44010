"""`VSAAttnProcessor`: Video Sparse Attention through diffusers' own `set_attn_processor`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .config import VSAConfig, make_config, module_configs
from .models import attention_modules, attention_processor, dense_attention, require_family
from .processor import FamilyAttnProcessor, VideoState, settle_choices
from .tiles import check_video_shape


class VSAAttnProcessor:
    """Video Sparse Attention for `transformer.set_attn_processor`, one instance for all modules or one per module.

    Video self-attention becomes sparse; cross-attention and audio run the model's stock processor. The video shape is
    fixed: `enable_vsa` is the way to have it read from the transformer's inputs. In LTX-2 and Kandinsky 5, whose audio
    or text layers use the same class as their video layers, the number of tokens tells them apart. Where several
    families share one attention class, `for_transformer` makes the processors instead.

    Args:
        config: a `VSAConfig`; `fields` (such as `top_k_ratio=0.2, video_shape=(21, 30, 52)`) are its fields. Those that
            need to know the whole transformer (`dense_steps`, `dense_layers`, `modules`) cannot be given.

    Raises:
        ValueError: `video_shape` is missing, or a field is wrong; when called, tokens do not match `video_shape`, or
            the attention class is not supported.
    """

    def __init__(self, config: VSAConfig | None = None, **fields: Any):
        self.config = make_config(config, fields)
        _refuse(self.config, {"dense_steps": 0, "dense_layers": (), "modules": None}, "VSAAttnProcessor")
        self.state = VideoState(check_video_shape(self.config.video_shape))
        self._per_module: dict[torch.nn.Module, Any] = {}
        self._dense_settings: dict[str, Any] = {"_attention_backend": None, "_parallel_config": None}

    @classmethod
    def for_transformer(
        cls, transformer: torch.nn.Module, config: VSAConfig | None = None, **fields: Any
    ) -> dict[str, Any]:
        """Processors for every attention module of `transformer`, as `set_attn_processor` takes them.

        Works for every supported family: video self-attention gets a processor of its family, and all other modules
        keep the processor that they have.

            transformer.set_attn_processor(
                VSAAttnProcessor.for_transformer(transformer, top_k_ratio=0.2, video_shape=(21, 30, 52))
            )

        Transformers without `set_attn_processor` (Cosmos, Allegro, AnyFlow) take each as `module.processor`, or
        `enable_vsa`.

        Args:
            transformer: a supported video transformer.
            config: a `VSAConfig`; `fields` are its fields. `video_shape` is needed; `dense_steps` cannot be given.

        Returns:
            Processors under the names of `transformer.attn_processors`, such as "blocks.0.attn1.processor".

        Raises:
            ValueError: the transformer is not supported, `video_shape` is missing, or a field is wrong.
        """
        config = make_config(config, fields)
        _refuse(config, {"dense_steps": 0}, "VSAAttnProcessor.for_transformer")
        family = require_family(transformer)
        state = VideoState(check_video_shape(config.video_shape))
        modules = attention_modules(transformer)
        video = list(family.video_modules(transformer))
        if not modules.keys() >= set(video):
            raise ValueError(
                f"{type(transformer).__name__} has video self-attention without a processor; use enable_vsa()."
            )
        configs = module_configs(config, video, [name for name in modules if name not in video])
        # The processors of an enabled VSA give way to those that they stand in for.
        processors = {name: getattr(attn.processor, "original", attn.processor) for name, attn in modules.items()}
        for name, each in configs.items():
            settled = settle_choices(each, modules[name], name)
            processor = family.processor_of(transformer, name)
            processors[name] = processor(settled, processors[name], state, name, strict=True)
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

    def _add(self, attn: torch.nn.Module) -> Any:
        processor: Any = dense_attention(attn)
        if processor is None:
            processor = _family_processor(attn).stand_in(self.config, attn, self.state)
        for name, value in self._dense_settings.items():
            setattr(processor, name, value)
        self._per_module[attn] = processor
        return processor


def _family_processor(attn: torch.nn.Module) -> type[FamilyAttnProcessor]:
    processor = attention_processor(type(attn))
    if processor is None:
        raise ValueError(
            f"attn={type(attn).__name__} does not tell VSAAttnProcessor which model family it serves: the class is "
            "unknown, or shared by several families. Use enable_vsa(pipe), or transformer.set_attn_processor("
            "VSAAttnProcessor.for_transformer(transformer, ...))."
        )
    return processor


def _refuse(config: VSAConfig, defaults: Mapping[str, Any], what: str) -> None:
    given = [name for name, default in defaults.items() if getattr(config, name) != default]
    if given:
        raise ValueError(f"{what} cannot serve {', '.join(given)}; use enable_vsa(pipe, ...).")
