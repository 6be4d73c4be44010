"""Whether a checkpoint fits the training that goes on from it, to the last key, size and type."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Sizes = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
# What the optimisers keep for a parameter, and whether it is of the parameter's size, or a single number.
STATES = {
    "Muon": {"momentum": True},
    "AdamW": {"step": False, "exp_avg": True, "exp_avg_sq": True},
}


@dataclass(frozen=True)
class Found:
    """What a JSON file of a checkpoint says.

    Args:
        path: the file.
        facts: its content.
    """

    path: Path
    facts: Mapping[str, Any]

    def value(self, name: str, kind: type) -> Any:
        """The value under `name`; raise `ValueError` unless it is of this type."""
        value = self.facts.get(name)
        if type(value) is not kind:
            raise ValueError(f"{self.path} has {name}={_short(value)}, where a {kind.__name__} was expected.")
        return value

    def equal(self, name: str, expected: Any) -> None:
        """Raise `ValueError` unless the value under `name` is this one, in its JSON form."""
        value, wanted = self.facts.get(name), json.loads(json.dumps(expected))
        if value != wanted:
            raise ValueError(f"{self.path} has {name}={_short(value)}, where {_short(wanted)} was expected.")


def learning_names(transformer: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """What learns, under the names that it has without wrappers."""
    return {
        plain_name(name): parameter for name, parameter in transformer.named_parameters() if parameter.requires_grad
    }


def plain_name(name: str) -> str:
    """A parameter's name without what compilation and activation checkpointing put into it."""
    return name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")


def expected_weights(transformer: torch.nn.Module) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Sizes and types of what a checkpoint holds of the transformer: all that it does not leave as it was."""
    frozen = {name for name, parameter in transformer.named_parameters() if not parameter.requires_grad}
    return {
        plain_name(name): (tuple(tensor.shape), tensor.dtype)
        for name, tensor in transformer.state_dict().items()
        if name not in frozen and isinstance(tensor, torch.Tensor)
    }


def parameter_names(
    transformer: torch.nn.Module, optimizers: Sequence[torch.optim.Optimizer]
) -> list[tuple[torch.optim.Optimizer, dict[str, Any], list[str]]]:
    """Every group of the optimisers, with its optimiser and the names of its parameters."""
    names = {id(parameter): name for name, parameter in learning_names(transformer).items()}
    return [
        (optimizer, group, [names[id(parameter)] for parameter in group["params"]])
        for optimizer in optimizers
        for group in optimizer.param_groups
    ]


def expected_groups(transformer: torch.nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> list[dict[str, Any]]:
    """Every group's parameters by name, and what it is updated with besides the learning rate."""
    settings = ("name", "betas", "eps", "momentum", "weight_decay")
    return [
        {"optimizer": type(optimizer).__name__, "params": names} | {key: group[key] for key in settings if key in group}
        for optimizer, group, names in parameter_names(transformer, optimizers)
    ]


def expected_moments(
    transformer: torch.nn.Module, optimizers: Sequence[torch.optim.Optimizer], without: Sequence[str]
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Sizes and types of the optimisers' states, but for those of the parameters that had none."""
    learning = learning_names(transformer)
    return {
        f"{name}/{key}": (tuple(learning[name].shape), learning[name].dtype) if whole else ((), torch.float32)
        for optimizer, _, names in parameter_names(transformer, optimizers)
        for name in names
        if name not in without
        for key, whole in STATES[type(optimizer).__name__].items()
    }


def check_tensors(path: Path, expected: Sizes, found: Mapping[str, torch.Tensor]) -> None:
    """Raise `ValueError`, which names the file, unless it holds just these tensors, all finite."""
    common = [key for key in expected if key in found]
    problems = {
        "missing keys": sorted(expected.keys() - found.keys()),
        "unexpected keys": sorted(found.keys() - expected.keys()),
        "other sizes": [
            f"{key}: {tuple(found[key].shape)}, needs {expected[key][0]}"
            for key in common
            if tuple(found[key].shape) != expected[key][0]
        ],
        "other types": [
            f"{key}: {found[key].dtype}, needs {expected[key][1]}"
            for key in common
            if found[key].dtype != expected[key][1]
        ],
        "NaN or infinity": [key for key in common if not found[key].isfinite().all()],
    }
    told = [f"{len(keys)} {what}: {keys[:3]}" for what, keys in problems.items() if keys]
    if told:
        raise ValueError(f"{path} does not fit this training: {'; '.join(told)}.")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
