"""Which parameters learn, and how fast."""

from __future__ import annotations

import re

import torch

from vsa_diffusers.models import require_family

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


def parameter_groups(transformer: torch.nn.Module, lr: float, gate_lr: float) -> list[dict]:
    """Groups for an optimiser: gates learn at `gate_lr`, everything else that learns at `lr`."""
    named = [(name, parameter) for name, parameter in transformer.named_parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for name, parameter in named if not is_gate(name)], "lr": lr},
        {"params": [parameter for name, parameter in named if is_gate(name)], "lr": gate_lr},
    ]
    return [group for group in groups if group["params"]]
