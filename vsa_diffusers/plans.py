"""How a family's tokens are spread over ranks, in diffusers' terms, and what a transformer needs before it runs so.

One rule for all families: the video stream is split, text and audio are whole on every rank, and only video
self-attention communicates.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist

from .config import VSAConfig
from .parallel import RING, Exchange, exchange_of
from .processor import FamilyAttnProcessor
from .running import RunningForward

logger = logging.getLogger(__name__)

Plan = Mapping[str, Any]
_PREPARED = "_vsa_context_parallel"


class SpreadsTokens(Protocol):
    """What is needed of a model family."""

    @property
    def stock_ring(self) -> bool: ...
    def why_not_parallel(self, transformer: torch.nn.Module) -> str | None: ...
    def context_parallel_plan(self, transformer: torch.nn.Module) -> Plan | None: ...
    def hooks_for_ranks(self, transformer: torch.nn.Module, exchange: Exchange) -> list[Any]: ...
    def video_modules(self, transformer: torch.nn.Module) -> dict[str, torch.nn.Module]: ...
    def processor_of(self, transformer: torch.nn.Module, name: str) -> type[FamilyAttnProcessor]: ...


@dataclass
class _Prepared:
    """What was done to a transformer for one parallel config.

    Args:
        config: diffusers' `ParallelConfig`.
        blocks: how many of them every stack had.
        video: video self-attention modules by name.
        others: all other modules with a processor.
        handles: of hooks, to remove them.
    """

    config: Any
    blocks: list[int]
    video: dict[str, torch.nn.Module]
    others: list[torch.nn.Module]
    handles: list[Any] = field(default_factory=list)


def prepare(transformer: torch.nn.Module, family: SpreadsTokens) -> None:
    """Before a forward: all that `enable_parallelism` leaves undone, or an error if that cannot be done.

    Raises:
        ValueError: this transformer, this kind of parallelism or this plan would give wrong results.
    """
    config = getattr(transformer, "_parallel_config", None)
    context = getattr(config, "context_parallel_config", None)
    prepared = vars(transformer).get(_PREPARED)
    blocks = [len(child) for child in transformer.children() if isinstance(child, torch.nn.ModuleList)]
    if prepared is not None and (prepared.config is not config or prepared.blocks != blocks):
        for handle in prepared.handles:
            handle.remove()
        delattr(transformer, _PREPARED)
        prepared = None
    if context is None:
        return
    exchange = exchange_of(config)
    if prepared is None:
        _check(transformer, family, exchange)
        video = family.video_modules(transformer)
        others = [
            module for name, module in transformer.named_modules() if name not in video and hasattr(module, "processor")
        ]
        prepared = _Prepared(config, blocks, video, others)
        if exchange is not None:
            prepared.handles += family.hooks_for_ranks(transformer, exchange)
            prepared.handles += _scale_gradients(transformer, exchange.ranks)
        setattr(transformer, _PREPARED, prepared)
    if exchange is None:
        for module in prepared.video.values():
            _tell(_serving(module), config)
        return
    exchange.forget()
    _decide_together(transformer, exchange)
    for module in prepared.others:
        _tell(_serving(module), None)
    for name, module in prepared.video.items():
        processor = _serving(module)
        if not isinstance(processor, FamilyAttnProcessor):
            processor = module.processor = _attend_together(transformer, family, name, processor)
        _tell(processor, config)


def _check(transformer: torch.nn.Module, family: SpreadsTokens, exchange: Exchange | None) -> None:
    name = type(transformer).__name__
    obstacle = family.why_not_parallel(transformer)
    if obstacle is not None:
        raise ValueError(f"{name} cannot run under context parallelism: {obstacle}.")
    if exchange is None and not family.stock_ring:
        raise ValueError(f"{name} cannot run under ring attention, which its own processors ignore: {RING}.")
    plan = family.context_parallel_plan(transformer)
    if plan is not None and _applied(transformer) != _hooks_of(transformer, plan):
        raise ValueError(
            f"{name} was split over ranks by another plan than the one it runs right with; call "
            "enable_parallelism(config=..., cp_plan=vsa_diffusers.cp_plan(transformer))."
        )


def _applied(transformer: torch.nn.Module) -> dict[tuple[int, str], Any]:
    """The hooks for context parallelism that the modules have, by module and name."""
    return {
        (id(module), name): _as_list(hook.metadata)
        for module in transformer.modules()
        if hasattr(module, "_diffusers_hook")
        for name, hook in module._diffusers_hook.hooks.items()
        if name.startswith(("cp_input---", "cp_output---"))
    }


def _hooks_of(transformer: torch.nn.Module, plan: Plan) -> dict[tuple[int, str], Any]:
    """Those that a plan makes."""
    from diffusers.hooks.context_parallel import _get_submodule_by_name

    hooks = {}
    for key, spread in plan.items():
        modules = _get_submodule_by_name(transformer, key)
        kind = "input" if isinstance(spread, Mapping) else "output"
        for module in modules if isinstance(modules, list) else [modules]:
            hooks[id(module), f"cp_{kind}---{key}"] = _as_list(spread)
    return hooks


def _as_list(metadata: Any) -> Any:
    return metadata if isinstance(metadata, Mapping) else metadata if isinstance(metadata, list) else [metadata]


def _serving(module: torch.nn.Module) -> Any:
    """The processor that serves a module's calls, behind one that serves several modules, or before its forward."""
    processor = getattr(module, "processor", None) or getattr(vars(module).get("forward"), "func", None)
    of = getattr(processor, "_processor_of", None)
    return processor if of is None else of(module)


def _tell(processor: Any, config: Any) -> None:
    if getattr(processor, "_parallel_config", config) is not config:
        processor._parallel_config = config


def _attend_together(transformer: torch.nn.Module, family: SpreadsTokens, name: str, found: Any) -> FamilyAttnProcessor:
    """A processor that makes the dense calls of diffusers' own over all ranks."""
    if type(found).__module__.partition(".")[0] != "diffusers":
        raise ValueError(
            f"{name} of {type(transformer).__name__} has a processor that is not diffusers' own, "
            f"{type(found).__name__}, which would attend within the tokens of one rank; remove it, or call the "
            "transformer without enable_parallelism."
        )
    make = family.processor_of(transformer, name)
    processor = make(VSAConfig(combine="sparse"), found, RunningForward(), name)
    processor.stays_dense = True
    return processor


def _decide_together(transformer: torch.nn.Module, exchange: Exchange) -> None:
    """A cache that judges by a rank's own tokens whether to skip blocks would leave other ranks waiting in them."""
    for blocks in transformer.children():
        if isinstance(blocks, torch.nn.ModuleList) and len(blocks) and hasattr(blocks[0], "_diffusers_hook"):
            for hook in blocks[0]._diffusers_hook.hooks.values():
                decide = getattr(hook, "_should_compute_remaining_blocks", None)
                if decide is not None and not isinstance(decide, _Vote):
                    hook._should_compute_remaining_blocks = _Vote(decide, exchange)


class _Vote:
    """A decision that is yes on every rank where it is on one.

    Args:
        decide: of this rank, by its own tokens.
        exchange: over the ranks.
    """

    def __init__(self, decide: Callable[[torch.Tensor], bool], exchange: Exchange):
        self.decide = decide
        self.exchange = exchange

    @torch.compiler.disable
    def __call__(self, tokens: torch.Tensor) -> bool:
        vote = torch.tensor(int(self.decide(tokens)), device=tokens.device)
        dist.all_reduce(vote, dist.ReduceOp.MAX, group=self.exchange.group)
        return bool(vote)


class _ScaleGradient(torch.autograd.Function):
    """Identity whose gradient is multiplied by `factor`."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, factor: int) -> torch.Tensor:
        ctx.factor = factor
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0] * ctx.factor, None


def _scale_gradients(transformer: torch.nn.Module, ranks: int) -> list[Any]:
    """Make the gradients of diffusers' gathers those of a sum over the losses of all ranks.

    It gives a rank the part of its own loss alone, though all ranks have the same one; so the mean over ranks, which
    DDP and FSDP take, would be as many times too small.
    """

    def scale(module: torch.nn.Module, args: Any, output: Any) -> Any:
        if not torch.is_grad_enabled():
            return output
        if isinstance(output, torch.Tensor):
            return _ScaleGradient.apply(output, ranks)
        return tuple(_ScaleGradient.apply(each, ranks) for each in output)

    gathering = {module for module, name in _applied(transformer) if name.startswith("cp_output---")}
    return [module.register_forward_hook(scale) for module in transformer.modules() if id(module) in gathering]


def prepare_when_called(transformer: torch.nn.Module, family: SpreadsTokens) -> None:
    """`prepare` before every forward from now on, sparse attention enabled or not."""
    if not hasattr(transformer, "_vsa_prepares"):
        hook = functools.partial(_prepare_called, family)
        transformer._vsa_prepares = transformer.register_forward_pre_hook(hook)


@torch.compiler.disable
def _prepare_called(family: SpreadsTokens, transformer: torch.nn.Module, args: Any) -> None:
    prepare(transformer, family)
