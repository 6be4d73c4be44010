"""A whole transformer over groups of ranks, and by each rank alone again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from .. import (
    VSAConfig,
    add_gate_compress,
    cp_plan,
    disable_guidance_parallel,
    disable_vsa,
    enable_guidance_parallel,
    enable_vsa,
)

GATE_STD = 0.02
"""Of the random weights of gates: without them the coarse branch would have no weight, and no error would show."""


def make_mesh(device: str, ranks: int, guidance: int = 1) -> Any:
    """Groups of `ranks` that make a forward each, side by side; within each, `guidance` groups with Ulysses inside."""
    shape = (dist.get_world_size() // ranks, guidance, 1, ranks // guidance)
    return init_device_mesh(device, shape, mesh_dim_names=("forward", "guidance", "ring", "ulysses"))


def enable_ulysses(model: torch.nn.Module, mesh: Any, uneven: bool) -> None:
    """Split tokens over the dimension "ulysses" of a mesh."""
    from diffusers import ContextParallelConfig

    config = ContextParallelConfig(
        ulysses_degree=mesh["ulysses"].size(), mesh=mesh["ring", "ulysses"], ulysses_anything=uneven
    )
    model.enable_parallelism(config=config, cp_plan=cp_plan(model))


@contextmanager
def spread(model: torch.nn.Module, mesh: Any, uneven: bool) -> Iterator[None]:
    """While inside, the ranks of each group make a forward together, as with `spread_over_gpus`; it is left dense."""
    from diffusers.hooks.context_parallel import remove_context_parallel

    ulysses, guidance = mesh["ulysses"].size(), mesh["guidance"].size()
    if ulysses > 1:
        enable_ulysses(model, mesh, uneven)
    pipe = None
    if guidance > 1:
        pipe = guided_pipeline(model)
        enable_guidance_parallel(pipe, mesh)
    try:
        yield
    finally:
        if pipe is not None:
            disable_guidance_parallel(pipe)
        disable_vsa(model)  # what it stood in for has to be told, too
        if ulysses > 1:
            remove_context_parallel(model, cp_plan(model))
            model._parallel_config = None
            for module in model.modules():
                if hasattr(getattr(module, "processor", None), "_parallel_config"):
                    module.processor._parallel_config = None


def guided_pipeline(model: torch.nn.Module) -> Any:
    """A pipeline of nothing but the transformer, whose steps have two predictions."""
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

    pipe = WanPipeline(None, None, None, FlowMatchEulerDiscreteScheduler(), model)
    pipe._guidance_scale = 5.0
    return pipe


def set_attention(model: torch.nn.Module, what: str, ratio: float, block_size: Any) -> str:
    """Make self-attention dense, or sparse at a constant ratio; returns what it is now in words."""
    if what == "dense":
        disable_vsa(model)
        return what
    config = VSAConfig(ratio, combine=what, block_size=None if what == "gate" else block_size, schedule="constant")
    enable_vsa(model, config=config)
    return f"{what} {ratio:g}"


def add_random_gates(model: torch.nn.Module) -> None:
    """Gates as training may have left them, the same on every rank."""
    for name in add_gate_compress(model):
        for parameter in model.get_submodule(name).to_gate_compress.parameters():
            torch.nn.init.normal_(parameter, std=GATE_STD)


def from_all(value: Any) -> list[Any]:
    """Every rank's value, on every rank."""
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, value)
    return told


def number_of_layers(model: torch.nn.Module) -> int:
    """Blocks of all kinds."""
    return sum(len(child) for child in model.children() if isinstance(child, torch.nn.ModuleList))
