"""`enable_vsa` and `disable_vsa`: processors per module, and the hook that reads each forward's video shape."""

from __future__ import annotations

import functools
import inspect
import logging
import math
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch

from .config import VSAConfig, module_configs
from .models import Family, attention_modules, find_family, refusal, supported_transformers
from .processor import FamilyAttnProcessor, VideoState, settle_choices
from .tiles import check_top_k

logger = logging.getLogger(__name__)

PipelineOrTransformer = TypeVar("PipelineOrTransformer")
_INSTALLATION = "_vsa_installation"


def enable_vsa(
    pipe: PipelineOrTransformer,
    top_k_ratio: float = 0.5,
    *,
    block_size: Sequence[int] | str = (4, 4, 4),
    combine: str = "auto",
    selection: str = "auto",
    video_shape: Sequence[int] | None = None,
    dense_steps: float = 0,
    dense_layers: Sequence[int] = (),
    modules: Sequence[str] | None = None,
    config: VSAConfig | Mapping[str, Any] | None = None,
) -> PipelineOrTransformer:
    """Make the video self-attention of a diffusers pipeline sparse. Calling it again re-configures it.

    The argument that matters:
        top_k_ratio: share of key tiles that each query tile attends to exactly, in (0, 1]; lower is faster.

    Args:
        pipe: a pipeline (every video transformer in it, such as `transformer` and `transformer_2`), or a transformer.
        block_size: `(t, h, w)`, tokens per tile along each axis, or `"auto"` (see `VSAConfig`).
        combine: how the coarse and the sparse branch become one output; `"auto"` uses trained gates where there are
            some, and otherwise "merge", which needs no training. See `video_sparse_attention`.
        selection: what key tiles are scored by: `"mean"`, `"quarters"` (see `video_sparse_attention`), or `"auto"`:
            "quarters" with "merge", which keeps better tiles for a few percent of attention's time, else "mean".
        video_shape: `(T, H, W)`, the grid of video tokens; `None` reads it from the transformer's inputs at every call.
        dense_steps: first denoising steps that stay dense, as a number or as a share of the scheduler's steps.
        dense_layers: positions of video self-attention modules that stay dense; negative ones count from the end.
        modules: patterns of module names that become sparse; `None` means every video self-attention.
        config: a `VSAConfig`, or a dict of patterns such as `VSA_DEFAULT`, instead of the arguments above.

    Returns:
        `pipe` itself.

    Raises:
        ValueError, TypeError: an argument is wrong, or there is no supported transformer; nothing was changed then.
    """
    arguments = {
        "top_k_ratio": top_k_ratio,
        "block_size": block_size,
        "combine": combine,
        "selection": selection,
        "video_shape": video_shape,
        "dense_steps": dense_steps,
        "dense_layers": dense_layers,
        "modules": modules,
    }
    if config is None:
        config = VSAConfig(**arguments)  # type: ignore[arg-type]
    else:
        defaults = {field.name: field.default for field in fields(VSAConfig)}
        extra = [name for name, value in arguments.items() if value != defaults[name]]
        if extra:
            raise ValueError(f"config= was given together with {', '.join(extra)}; put them into the config.")
    plans = [_Plan.make(pipe, transformer, family, config) for transformer, family in _transformers(pipe)]
    for plan in plans:
        _remove(plan.transformer)
        plan.install()
    return pipe


def disable_vsa(pipe: PipelineOrTransformer) -> PipelineOrTransformer:
    """Restore the processors that `enable_vsa` found, and remove its hooks. Gates stay where they are.

    Args:
        pipe: the pipeline or transformer; one on which VSA is not enabled is left as it is.

    Returns:
        `pipe` itself.
    """
    for transformer, _ in _transformers(pipe):
        _remove(transformer)
    return pipe


def set_top_k_ratio(pipe: PipelineOrTransformer, top_k_ratio: float) -> PipelineOrTransformer:
    """Change the share of key tiles that every sparse module keeps. Cheap enough for every training step.

    Args:
        pipe: a pipeline or transformer on which VSA is enabled.
        top_k_ratio: as in `enable_vsa`; replaces a `top_k`, too.

    Returns:
        `pipe` itself.

    Raises:
        ValueError: VSA is not enabled, or `top_k_ratio` is not in (0, 1]; nothing was changed then.
    """
    installations = [_installed(transformer) for transformer, _ in _transformers(pipe)]
    check_top_k(None, top_k_ratio)
    for installation in installations:
        for processor in installation.processors:
            processor.config = replace(processor.config, top_k=None, top_k_ratio=top_k_ratio)
        if isinstance(installation.config, VSAConfig):
            installation.config = replace(installation.config, top_k=None, top_k_ratio=top_k_ratio)
    return pipe


def enabled_config(transformer: torch.nn.Module) -> VSAConfig | Mapping[str, Any]:
    """The config that VSA is enabled with.

    Raises:
        ValueError: it is not enabled.
    """
    return _installed(transformer).config


def supported_parts(pipe: Any) -> dict[str, torch.nn.Module]:
    """The supported transformers of a pipeline by name; a transformer by itself is "transformer".

    Raises:
        ValueError, TypeError: there is none.
    """
    transformers = [transformer for transformer, _ in _transformers(pipe)]
    if isinstance(pipe, torch.nn.Module):
        return {"transformer": transformers[0]}
    names = {id(getattr(part, "_orig_mod", part)): name for name, part in pipe.components.items()}
    return {names[id(transformer)]: transformer for transformer in transformers}


class ShapeHook:
    """Forward pre-hook of the transformer: tells its processors this forward's video shape, and whether it is dense.

    PyTorch runs it before the hooks of diffusers and accelerate, so it sees the inputs whole.
    """

    def __init__(self, state: VideoState, family: Family, parameters: list[str], config: VSAConfig, pipe: Any):
        self.state = state
        self.family = family
        self.parameters = parameters
        self.video_shape = config.video_shape
        self.dense_steps = config.dense_steps
        self.pipe = weakref.ref(pipe) if config.dense_steps else None

    # The step counter changes at every call: compiled, it would be a new graph for every step.
    @torch.compiler.disable
    def __call__(self, transformer: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.video_shape is None:
            inputs = dict(zip(self.parameters, args, strict=False)) | kwargs
            self.state.video_shape = self.family.read_grid(transformer, inputs)
        if self.pipe is not None:
            pipe = self.pipe()
            self.state.dense_step = pipe is not None and is_dense_step(pipe.scheduler, self.dense_steps)


def is_dense_step(scheduler: Any, dense_steps: float) -> bool:
    """Whether the step that `scheduler` is about to take is among the first `dense_steps` (a count, or a share)."""
    begin = getattr(scheduler, "begin_index", None) or 0
    step = 0 if scheduler.step_index is None else scheduler.step_index - begin
    if isinstance(dense_steps, float):
        dense_steps = math.ceil(dense_steps * (len(scheduler.timesteps) - begin))
    return step < dense_steps


@dataclass
class _Plan:
    """Everything that enabling will do to one transformer, worked out before anything is changed."""

    transformer: torch.nn.Module
    modules: dict[str, torch.nn.Module]
    configs: dict[str, VSAConfig]
    state: VideoState
    hook: ShapeHook
    family: Family
    config: VSAConfig | Mapping[str, Any]

    @classmethod
    def make(cls, pipe: Any, transformer: torch.nn.Module, family: Family, config: VSAConfig | Mapping) -> _Plan:
        modules = family.video_modules(transformer)
        others = [name for name in attention_modules(transformer) if name not in modules]
        configs = module_configs(config, list(modules), others)
        configs = {name: settle_choices(each, modules[name], name) for name, each in configs.items()}
        shapes = {each.video_shape for each in configs.values()}
        if len(shapes) > 1:
            raise ValueError(
                f"config sets different values of video_shape in one transformer: {sorted(map(str, shapes))}."
            )
        shared = config if isinstance(config, VSAConfig) else VSAConfig(video_shape=next(iter(shapes), None))
        if shared.dense_steps and not hasattr(getattr(pipe, "scheduler", None), "step_index"):
            what = type(getattr(pipe, "scheduler", pipe)).__name__
            raise ValueError(
                f"dense_steps={shared.dense_steps} counts the scheduler's steps, but {what} has no step_index; call "
                "enable_vsa on a pipeline whose scheduler counts its steps, or leave dense_steps at 0."
            )
        state = VideoState(shared.video_shape)
        parameters = list(inspect.signature(type(transformer).forward).parameters)[1:]
        hook = ShapeHook(state, family, parameters, shared, pipe)
        return cls(transformer, modules, configs, state, hook, family, config)

    def install(self) -> None:
        originals, processors = {}, []
        for name, config in self.configs.items():
            attn = self.modules[name]
            originals[name] = original = getattr(attn, "processor", None) or _OwnForward(attn)
            strict = config.video_shape is not None
            processor = self.family.processor_of(self.transformer, name)
            processors.append(processor(config, original, self.state, name, strict))
            _put(attn, processors[-1])
        handle = self.transformer.register_forward_pre_hook(self.hook, with_kwargs=True)
        setattr(self.transformer, _INSTALLATION, _Installation(originals, handle, processors, self.config))
        dense = [name for name in self.modules if name not in self.configs]
        logger.info("%s: %d modules sparse, dense: %s", self.family.name, len(originals), dense or "none")


@dataclass
class _Installation:
    originals: dict[str, Any]
    handle: Any
    processors: list[FamilyAttnProcessor]
    config: VSAConfig | Mapping[str, Any]


def _installed(transformer: torch.nn.Module) -> _Installation:
    installation = getattr(transformer, _INSTALLATION, None)
    if installation is None:
        raise ValueError(f"VSA is not enabled on {type(transformer).__name__}; call enable_vsa first.")
    return installation


def _remove(transformer: torch.nn.Module) -> None:
    installation = getattr(transformer, _INSTALLATION, None)
    if installation is None:
        return
    for name, original in installation.originals.items():
        _take_away(transformer.get_submodule(name), original)
    installation.handle.remove()
    delattr(transformer, _INSTALLATION)


class _OwnForward:
    """Serves the dense calls of a module that has no processor; the sparse one stands in front of its `forward`."""

    def __init__(self, attn: torch.nn.Module):
        # Offloading hooks, for example, set a forward on the instance.
        self.hooked = vars(attn).get("forward")

    def __call__(self, attn: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.hooked(*args, **kwargs) if self.hooked else type(attn).forward(attn, *args, **kwargs)

    def restore(self, attn: torch.nn.Module) -> None:
        del attn.forward
        if self.hooked:
            attn.forward = self.hooked


def _put(attn: torch.nn.Module, processor: Any) -> None:
    if hasattr(attn, "processor"):
        attn.processor = processor
    else:
        attn.forward = functools.partial(processor, attn)


def _take_away(attn: torch.nn.Module, original: Any) -> None:
    if isinstance(original, _OwnForward):
        original.restore(attn)
    # A processor that somebody set since then is theirs to keep.
    elif getattr(attn.processor, "original", None) is original:
        attn.processor = original


def _transformers(pipe: Any) -> list[tuple[torch.nn.Module, Family]]:
    """The supported transformers of a pipeline, or the given one, each with its family."""
    if isinstance(pipe, torch.nn.Module):
        candidates = [pipe]
    elif isinstance(getattr(pipe, "components", None), Mapping):
        candidates = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    else:
        raise TypeError(
            f"pipe={type(pipe).__name__} is neither a diffusers pipeline nor a transformer; pass the pipeline, for "
            "example WanPipeline.from_pretrained(...), or its transformer."
        )
    unwrapped = [getattr(part, "_orig_mod", part) for part in candidates]
    found = [(part, family) for part in unwrapped if (family := find_family(part)) is not None]
    if not found:
        names = ", ".join(sorted({type(part).__name__ for part in unwrapped})) or "no modules"
        raise ValueError(
            next(filter(None, map(refusal, unwrapped)), None)
            or f"{type(pipe).__name__} has no supported video transformer (found: {names}); supported are: "
            f"{', '.join(supported_transformers())}. Teach your own class with register_transformer."
        )
    return found
