"""Which parameters learn, how fast, and by which optimiser."""

from __future__ import annotations

import re

import torch

from vsa_diffusers.models import require_family

from .muon import Muon

GATE = "to_gate_compress"


def choose_trainable(transformer: torch.nn.Module, what: str) -> None:
    """Set `requires_grad`: `"all"`, only the `"attention"` modules that become sparse, or only their `"gates"`.

    Raises:
        ValueError: `what` is something else, or there are no gates to train.
    """
    sparse = tuple(f"{name}." for name in require_family(transformer).video_modules(transformer))
    chosen = {
        "all": lambda name: True,
        "attention": lambda name: name.startswith(sparse),
        "gates": is_gate,
    }
    if what not in chosen:
        raise ValueError(f"what={what!r} is unknown; choose one of {', '.join(map(repr, chosen))}.")
    for name, parameter in transformer.named_parameters():
        parameter.requires_grad_(chosen[what](name))
    if not any(parameter.requires_grad for parameter in transformer.parameters()):
        raise ValueError(f"what={what!r} leaves nothing to train; call add_gate_compress(transformer) before.")


def is_gate(name: str) -> bool:
    """Whether a parameter of this name belongs to a gate."""
    return re.search(rf"(^|\.){GATE}\.", name) is not None


def is_lora(name: str) -> bool:
    """Whether a parameter of this name belongs to a LoRA."""
    return "lora_" in name


def block_prefixes(transformer: torch.nn.Module) -> tuple[str, ...]:
    """What the names of everything inside the blocks begin with, wherever the family keeps them."""
    return tuple(sorted({f"{name.split('.')[0]}." for name in require_family(transformer).video_modules(transformer)}))


def parameter_groups(transformer: torch.nn.Module, lr: float, gate_lr: float) -> list[dict]:
    """Groups for an optimiser: gates learn at `gate_lr`, everything else that learns at `lr`; `name` says which."""
    named = [(name, parameter) for name, parameter in transformer.named_parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for name, parameter in named if not is_gate(name)], "lr": lr, "name": "lr"},
        {"params": [parameter for name, parameter in named if is_gate(name)], "lr": gate_lr, "name": "gate_lr"},
    ]
    return [group for group in groups if group["params"]]


def make_optimizers(
    transformer: torch.nn.Module,
    optimizer: str,
    lr: float,
    gate_lr: float,
    betas: tuple[float, float] = (0.9, 0.99),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> list[torch.optim.Optimizer]:
    """AdamW for everything that learns, or Muon for the matrices of the blocks and AdamW for the rest.

    Gates and LoRAs are the rest, too: gates learn at a rate of their own, and both begin at zero.

    Raises:
        ValueError: `optimizer` is neither "adamw" nor "muon".
    """
    if optimizer not in ("adamw", "muon"):
        raise ValueError(f"optimizer={optimizer!r} is unknown; choose 'adamw' or 'muon'.")
    blocks = block_prefixes(transformer)
    matrices = [
        parameter
        for name, parameter in transformer.named_parameters()
        if optimizer == "muon"
        and parameter.requires_grad
        and parameter.ndim == 2
        and name.startswith(blocks)
        and not is_gate(name)
        and not is_lora(name)
    ]
    taken = {id(parameter) for parameter in matrices}
    groups = [
        group | {"params": [parameter for parameter in group["params"] if id(parameter) not in taken]}
        for group in parameter_groups(transformer, lr, gate_lr)
    ]
    groups = [group for group in groups if group["params"]]
    made: list[torch.optim.Optimizer] = []
    if matrices:
        made.append(Muon([{"params": matrices, "name": "lr"}], lr, weight_decay=weight_decay))
    if groups:
        made.append(torch.optim.AdamW(groups, betas=betas, eps=eps, weight_decay=weight_decay))
    return made
