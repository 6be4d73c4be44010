"""`enable_vsa` and `disable_vsa`: processors per module, and the hooks that tell them what forward is running."""

from __future__ import annotations

import contextlib
import functools
import logging
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.distributed.fsdp import FullyShardedDataParallel

from .config import VSAConfig, make_config, module_configs, resolve_config
from .models import Family, attention_modules, find_family, refusal, supported_transformers
from .processor import FamilyAttnProcessor, dense_gate_configs, dense_processor, settle_choices
from .recipes import with_recipes
from .running import ForwardHooks
from .schedule import RatioSchedule, mean_share
from .tiles import check_top_k
from .trained import warn_of_lost_gates, warn_of_other_settings
from .wording import as_arguments, grouped, settings

logger = logging.getLogger(__name__)

PipelineOrTransformer = TypeVar("PipelineOrTransformer")
_INSTALLATION = "_vsa_installation"
_OWNER = "_vsa_owner"
MOST_SAID = 3  # settings in one line of the log
USUAL_STEPS = 50
_WRAPPERS = (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel, FullyShardedDataParallel)


@with_recipes(lambda pipe: [family.name for _, family in _transformers(pipe)])
def enable_vsa(
    pipe: PipelineOrTransformer,
    top_k_ratio: float = 0.5,
    *,
    block_size: Sequence[int] | str | None = None,
    combine: str = "auto",
    selection: str = "auto",
    schedule: str | RatioSchedule | Mapping[str, Any] = "auto",
    video_shape: Sequence[int] | None = None,
    dense_steps: float = 0,
    dense_layers: Sequence[int] = (),
    modules: Sequence[str] | None = None,
    top_k: int | None = None,
    implementation: str = "auto",
    recipe: str | None = None,
    config: VSAConfig | Mapping[str, Any] | None = None,
) -> PipelineOrTransformer:
    """Make the video self-attention of a diffusers pipeline sparse. Calling it again re-configures it.

    The argument that matters is `top_k_ratio`; the others are there to tinker with.

    Args:
        pipe: a pipeline (every video transformer in it, such as `transformer` and `transformer_2`), or a transformer.
        top_k_ratio: share of key tiles that each query tile attends to exactly, in (0, 1]; lower is faster.
        block_size: `(t, h, w)`, tokens per tile along each axis, or `"auto"`, the block that fits the video best;
            `None`: "auto" with "merge", else (4, 4, 4), which gates have been trained for. See `VSAConfig`.
        combine: how the coarse and the sparse branch become one output; `"auto"` uses trained gates where there are
            some, and otherwise "merge", which needs no training. See `video_sparse_attention`.
        selection: what key tiles are scored by: `"mean"`, `"quarters"` (see `video_sparse_attention`), or `"auto"`:
            "quarters" with "merge", which keeps better tiles for a few percent of attention's time, else "mean".
        schedule: how the ratio changes over the run: `"constant"`, `"front"` (`top_k_ratio` is the mean over the run,
            spent at the front), a `RatioSchedule` in the place of `top_k_ratio`, or `"auto"`: "front" with "merge",
            "constant" with gates and `top_k`.
        video_shape: `(T, H, W)`, the grid of video tokens; `None` reads it from the transformer's inputs at every call.
        dense_steps: first denoising steps that stay dense, as a number or as a share of the scheduler's steps.
        dense_layers: positions of video self-attention modules that stay dense; negative ones count from the end.
        modules: patterns of module names that become sparse; `None` means every video self-attention.
        top_k: number of key tiles to keep, instead of `top_k_ratio`.
        implementation: as in `video_sparse_attention`.
        recipe: `"quality"`, `"balanced"` or `"fast"`: settings to begin with for this family and the size of its usual
            videos, or of `video_shape`, in place of the arguments that are left out; not together with `config`.
        config: a `VSAConfig`, or a dict of patterns such as `VSA_DEFAULT`; the arguments above fill in what it leaves
            unset, and may not contradict it.

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
        "schedule": schedule,
        "video_shape": video_shape,
        "dense_steps": dense_steps,
        "dense_layers": dense_layers,
        "modules": modules,
        "top_k": top_k,
        "implementation": implementation,
    }
    config = resolve_config(config, arguments)
    plans = [_Plan.make(transformer, family, config) for transformer, family in _transformers(pipe)]
    owner = None if isinstance(pipe, torch.nn.Module) else getattr(pipe, _OWNER, None) or uuid.uuid4().hex
    for plan in plans:
        plan.check_sharing(owner)
    labels = {id(part): name for name, part in supported_parts(pipe).items()} if owner else {}
    with vsa_unchanged_on_error([plan.transformer for plan in plans]):
        for plan in plans:
            _remove(plan.transformer)
            plan.install(owner, labels.get(id(plan.transformer)))
        if owner is not None:
            setattr(pipe, _OWNER, owner)
    _say_what_is_sparse(plans)
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
        top_k_ratio: as in `enable_vsa`: of every step, or the mean of `schedule="front"`, the default with "merge". It
            replaces a `top_k` or a `RatioSchedule`, too. To set the ratio of each step by a callback of the pipeline,
            enable VSA with `schedule="constant"`.

    Returns:
        `pipe` itself.

    Raises:
        ValueError: VSA is not enabled, or `top_k_ratio` is not in (0, 1]; nothing was changed then.
    """
    installations = [_installed(transformer) for transformer, _ in _transformers(pipe)]
    check_top_k(None, top_k_ratio)
    for installation in installations:
        if any(processor.config.schedule == "front" for processor in installation.processors):
            installation.hooks.warn_of_a_mean_set_in_a_run(top_k_ratio)
        for processor in installation.processors:
            processor.config = make_config(processor.config, {"top_k": None, "top_k_ratio": top_k_ratio})
        if isinstance(installation.config, VSAConfig):
            installation.config = make_config(installation.config, {"top_k": None, "top_k_ratio": top_k_ratio})
    return pipe


def enabled_config(transformer: torch.nn.Module) -> VSAConfig | Mapping[str, Any]:
    """The config that VSA is enabled with.

    Raises:
        ValueError: it is not enabled.
    """
    return _installed(transformer).config


def installed_hooks(transformer: torch.nn.Module) -> ForwardHooks | None:
    """The hooks that `enable_vsa` registered; `None` where VSA is not enabled by it."""
    installation = getattr(transformer, _INSTALLATION, None)
    return None if installation is None else installation.hooks


def supported_parts(pipe: Any) -> dict[str, torch.nn.Module]:
    """The supported transformers of a pipeline by name; a transformer by itself is "transformer".

    Raises:
        ValueError, TypeError: there is none.
    """
    transformers = [transformer for transformer, _ in _transformers(pipe)]
    if isinstance(pipe, torch.nn.Module):
        return {"transformer": transformers[0]}
    modules = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    names = {id(unwrap(part)): name for name, part in modules.items()}
    return {names[id(transformer)]: transformer for transformer in transformers}


def _say_what_is_sparse(plans: Sequence[_Plan]) -> None:
    """A line for each transformer; one for all that are alike, as the two experts of Wan 2.2."""
    alike: dict[str, list[str]] = {}
    for plan in plans:
        alike.setdefault(f"({plan.family.name}): {plan}", []).append(_installed(plan.transformer).hooks.label)
    for what, labels in alike.items():
        logger.info("%s %s", ", ".join(labels), what)


@dataclass
class _Plan:
    """Everything that enabling will do to one transformer, worked out before anything is changed."""

    transformer: torch.nn.Module
    modules: dict[str, torch.nn.Module]
    asked: dict[str, VSAConfig]
    configs: dict[str, VSAConfig]
    dense: dict[str, VSAConfig]
    family: Family
    config: VSAConfig | Mapping[str, Any]

    @classmethod
    def make(cls, transformer: torch.nn.Module, family: Family, config: VSAConfig | Mapping[str, Any]) -> _Plan:
        modules = family.video_modules(transformer)
        others = [name for name in attention_modules(transformer) if name not in modules]
        asked = module_configs(config, list(modules), others)
        configs = {name: settle_choices(each, modules[name], name) for name, each in asked.items()}
        shapes = {each.video_shape for each in configs.values()}
        if len(shapes) > 1:
            raise ValueError(
                f"config sets different values of video_shape in one transformer: {sorted(map(str, shapes))}."
            )
        dense = dense_gate_configs(config, asked, configs, modules)
        return cls(transformer, modules, asked, configs, dense, family, config)

    def check_sharing(self, owner: str | None) -> None:
        """Pipelines that share a transformer share its VSA: refuse, or tell, what another one would not expect."""
        before = getattr(self.transformer, _INSTALLATION, None)
        if before is None or owner is None or before.owner in (None, owner) or before.config == self.config:
            return
        name = type(self.transformer).__name__
        ours, theirs = ({each.dense_steps for each in configs.values()} for configs in (self.configs, before.configs))
        if ours != theirs:
            raise ValueError(
                f"dense_steps={_one(ours)}, but VSA was enabled on this {name} through another pipeline with "
                f"dense_steps={_one(theirs)}, and both would count by the last; call disable_vsa(pipe) first, or give "
                "this pipeline a transformer of its own."
            )
        logger.warning("%s: VSA changes for the other pipeline that it was enabled through, too.", name)

    def install(self, owner: str | None, label: str | None) -> None:
        hooks = ForwardHooks(self.transformer, self.family, label=label)
        installation = _Installation({}, hooks, [], self.configs, self.config, owner)
        setattr(self.transformer, _INSTALLATION, installation)
        theirs = {}
        for name, config in (self.configs | self.dense).items():
            attn = self.modules[name]
            found = getattr(attn, "processor", None) or _OwnForward(attn)
            if not isinstance(found, _OwnForward) and not _is_stock(found, self.transformer):
                theirs[name] = type(found).__name__
            strict = config.video_shape is not None
            cls = self.family.processor_of(self.transformer, name)
            stays_dense = name in self.dense
            state = hooks.state_for(config, cls.tiled_grid, stays_dense)
            processor = cls(config, dense_processor(found, attn), state, name, strict)
            processor.stays_dense = stays_dense
            installation.found[name] = found
            installation.processors.append(processor)
            hooks.watch(name, attn, processor, self.asked.get(name, config))
            _put(attn, processor)
        for name, attn in self.modules.items():
            if name not in self.configs and name not in self.dense:
                hooks.watch_dense(name, attn)
        hooks.register()
        warn_of_lost_gates(hooks.label, self.transformer, self.modules, self.configs)
        warn_of_other_settings(hooks.label, self.transformer, self.configs)
        if theirs:
            logger.warning(
                "%d modules had processors that are not diffusers' own, which serve dense calls only from now on: %s.",
                len(theirs), ", ".join(f"{name} ({what})" for name, what in theirs.items()),
            )  # fmt: skip
        self._report_dense_steps()

    def __str__(self) -> str:
        """What became sparse, how, and what stays dense."""
        alike: dict[VSAConfig, list[str]] = {}
        for name, config in self.configs.items():
            alike.setdefault(config, []).append(name)
        groups = [f"{grouped(names)} with {as_arguments(settings(config))}" for config, names in alike.items()]
        if len(groups) > MOST_SAID:
            groups = [f"{grouped(self.configs)} with {len(groups)} settings, which vsa_status(pipe) shows"]
        dense = [grouped(name for name in self.modules if name not in self.configs), self.family.stays_dense]
        return (
            f"{len(self.configs)} of {len(self.modules)} video self-attention modules are sparse: "
            f"{'; '.join(groups) or 'none'}. Dense: {'; '.join(filter(None, dense))}."
        )

    def _report_dense_steps(self) -> None:
        """Dense steps come on top of a budget."""
        for config in {each for each in self.configs.values() if each.schedule == "front" and each.dense_steps}:
            mean = mean_share("front", config.top_k_ratio, config.dense_steps, USUAL_STEPS)
            logger.info(
                "dense_steps=%s come on top of top_k_ratio=%s: over %d steps %.2f of the tiles are kept on average.",
                config.dense_steps, config.top_k_ratio, USUAL_STEPS, mean,
            )  # fmt: skip


@dataclass
class _Installation:
    """What enabling did to a transformer.

    Args:
        found: processors by module, as they were before.
        hooks: those of the transformer.
        processors: ours.
        configs: theirs by module, choices settled.
        config: as it was given.
        owner: mark of the pipeline through which it was enabled.
    """

    found: dict[str, Any]
    hooks: ForwardHooks
    processors: list[FamilyAttnProcessor]
    configs: dict[str, VSAConfig]
    config: VSAConfig | Mapping[str, Any]
    owner: str | None

    def put_back(self, transformer: torch.nn.Module) -> None:
        """Enable again what was removed."""
        setattr(transformer, _INSTALLATION, self)
        for processor in self.processors:
            _put(transformer.get_submodule(processor.name), processor)
        self.hooks.register()


def _installed(transformer: torch.nn.Module) -> _Installation:
    installation = getattr(transformer, _INSTALLATION, None)
    if installation is None:
        raise ValueError(f"VSA is not enabled on {type(transformer).__name__}; call enable_vsa first.")
    return installation


def _remove(transformer: torch.nn.Module) -> None:
    installation = getattr(transformer, _INSTALLATION, None)
    if installation is None:
        return
    for name, found in installation.found.items():
        _take_away(transformer.get_submodule(name), found, installation.processors)
    installation.hooks.remove()
    delattr(transformer, _INSTALLATION)


@contextlib.contextmanager
def vsa_unchanged_on_error(transformers: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Whatever interrupts the block, a keyboard included, leaves the transformers as they were."""
    put_back = _recorded(transformers)
    try:
        yield
    except BaseException:
        put_back()
        raise


@contextlib.contextmanager
def vsa_unchanged(transformers: Sequence[torch.nn.Module]) -> Iterator[None]:
    """However the block ends, it leaves the transformers as they were."""
    put_back = _recorded(transformers)
    try:
        yield
    finally:
        put_back()


def _recorded(transformers: Sequence[torch.nn.Module]) -> Callable[[], None]:
    """What enables VSA again as it is now."""
    before = [getattr(transformer, _INSTALLATION, None) for transformer in transformers]

    def put_back() -> None:
        for transformer, installation in zip(transformers, before, strict=True):
            _remove(transformer)
            if installation is not None:
                installation.put_back(transformer)

    return put_back


def install_vsa(transformer: torch.nn.Module, config: VSAConfig, label: str) -> dict[str, FamilyAttnProcessor]:
    """What `enable_vsa(transformer, config=config)` does, without a word of it in the log.

    Returns:
        The processors, as `sparse_processors` returns them.
    """
    [(model, family)] = _transformers(transformer)
    plan = _Plan.make(model, family, config)
    with vsa_unchanged_on_error([model]):
        _remove(model)
        plan.install(None, label)
    return sparse_processors(model)


def sparse_processors(transformer: torch.nn.Module) -> dict[str, FamilyAttnProcessor]:
    """The processors that VSA has in a transformer by module; the modules it left dense are not among them.

    Raises:
        ValueError: it is not enabled.
    """
    return {processor.name: processor for processor in _installed(transformer).processors}


def _one(values: set[Any]) -> Any:
    return next(iter(values)) if len(values) == 1 else sorted(values)


def _is_stock(processor: Any, transformer: torch.nn.Module) -> bool:
    """Whether a processor comes from diffusers, from this package, or from where the transformer's class does."""
    homes = {"diffusers", __package__, type(transformer).__module__.partition(".")[0]}
    return type(processor).__module__.partition(".")[0] in homes


class _OwnForward:
    """Serves the dense calls of a module that has no processor; the sparse one stands in front of its `forward`."""

    def __init__(self, attn: torch.nn.Module):
        # Offloading hooks, for example, set a forward on the instance.
        self.hooked = vars(attn).get("forward")

    def __call__(self, attn: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.hooked(*args, **kwargs) if self.hooked else type(attn).forward(attn, *args, **kwargs)

    def restore(self, attn: torch.nn.Module) -> None:
        vars(attn).pop("forward", None)
        if self.hooked:
            attn.forward = self.hooked


def _put(attn: torch.nn.Module, processor: Any) -> None:
    if hasattr(attn, "processor"):
        attn.processor = processor
    else:
        attn.forward = functools.partial(processor, attn)


def _take_away(attn: torch.nn.Module, found: Any, ours: Sequence[FamilyAttnProcessor]) -> None:
    if isinstance(found, _OwnForward):
        found.restore(attn)
    # A processor that somebody set since then is theirs to keep.
    elif any(attn.processor is processor for processor in ours):
        attn.processor = found


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
    unwrapped = list({id(part): part for part in map(unwrap, candidates)}.values())
    found = [(part, family) for part in unwrapped if (family := find_family(part)) is not None]
    if not found:
        names = ", ".join(sorted({type(part).__name__ for part in unwrapped})) or "no modules"
        raise ValueError(
            next(filter(None, map(refusal, unwrapped)), None)
            or f"{type(pipe).__name__} has no supported video transformer (found: {names}); supported are: "
            f"{', '.join(supported_transformers())}. Teach your own class with register_transformer."
        )
    return found


def unwrap(module: torch.nn.Module) -> torch.nn.Module:
    """The model inside of what torch.compile, DDP, FSDP, DataParallel or peft put around it."""
    while True:
        if hasattr(module, "_orig_mod"):
            module = module._orig_mod
        elif isinstance(module, _WRAPPERS):
            module = module.module
        elif hasattr(module, "get_base_model"):
            module = module.get_base_model()
        else:
            return module
