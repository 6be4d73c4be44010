"""Parts of the plans by which diffusers splits a transformer's tokens over ranks."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput

from ..parallel import Exchange

TOKENS = ContextParallelInput(split_dim=1, expected_dims=3)
"""Tokens `[batch, sequence, channels]`."""
PER_TOKEN = ContextParallelInput(split_dim=1, expected_dims=2)
"""A number for each of them, where there is one: with one for all, diffusers warns once and splits nothing."""
VIDEO = {"hidden_states": TOKENS}
JOINED = ContextParallelOutput(gather_dim=1, expected_dims=3)
"""A module's output, joined again."""


def tables(dim: int, dims: int) -> dict[Any, ContextParallelInput]:
    """A rotary embedding's cosines and sines, `dims` axes each, split along `dim` as they come out."""
    return {place: ContextParallelInput(split_dim=dim, expected_dims=dims, split_output=True) for place in (0, 1)}


def joint(rope: str, dims: tuple[int, int]) -> dict[str, Any]:
    """The plan of joint attention whose rotary tables come from a module."""
    return {rope: tables(*dims), "transformer_blocks.0": VIDEO, "proj_out": JOINED}


def before(modules: Iterable[torch.nn.Module], changes: dict[str, Any]) -> list[Any]:
    """Hooks that change arguments of the modules' forward, by place or by name.

    Args:
        modules: all of one class.
        changes: by argument, a function of its value and of all arguments by name.
    """

    def change(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        new = {name: to(given[name], given) for name, to in changes.items() if given.get(name) is not None}
        places = zip(names, args, strict=False)
        return tuple(new.get(name, value) for name, value in places), {
            name: new.get(name, value) for name, value in kwargs.items()
        }

    modules = list(modules)
    names = list(inspect.signature(type(modules[0]).forward).parameters)[1:] if modules else []
    return [module.register_forward_pre_hook(change, with_kwargs=True) for module in modules]


def video_keys(modules: Iterable[torch.nn.Module], exchange: Exchange, names: dict[str, int]) -> list[Any]:
    """Hooks for modules whose queries every rank has, while the keys are video tokens: they get those of all ranks.

    Args:
        modules: of the attention.
        exchange: over the ranks.
        names: of the arguments that are split, with the dimension.
    """
    return before(
        modules, {name: lambda tensor, given, dim=dim: exchange.gather(tensor, dim) for name, dim in names.items()}
    )


def join_first_output(module: torch.nn.Module, exchange: Exchange) -> list[Any]:
    """A hook for a module that returns the video and something that is whole already."""

    def join(module: torch.nn.Module, args: Any, output: tuple[Any, ...]) -> tuple[Any, ...]:
        return (exchange.gather(output[0], 1), *output[1:])

    return [module.register_forward_hook(join)]
