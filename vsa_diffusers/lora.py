"""A LoRA as `save_vsa` saves it. What it adapts is told by its weights, never by patterns of its config.

`adapter_config.json` may come from anywhere, and peft would run its patterns as regular expressions, allocate what its
ranks ask for and import the modules that it names. So only numbers and switches are taken from it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .files import read_json

ADAPTER = "vsa"
CONFIG_NAME = "adapter_config.json"
LORA_NAME = "pytorch_lora_weights.safetensors"
LORA_PREFIX = "transformer."  # what `load_lora_weights` of diffusers' pipelines expects

_SWITCHES = ("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out")
_INITS = (None, "gaussian", "eva", "orthogonal")
# What the weights tell, and what matters before training or to nobody.
_IGNORED = (
    *("r", "rank_pattern", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("peft_type", "task_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision"),
    *("inference_mode", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("megatron_config", "megatron_core", "runtime_config", "qalora_group_size", "ensure_weight_tying"),
)


def read_lora_config(file: Path, ranks: Mapping[str, int]) -> Any:
    """The `LoraConfig` of a saved adapter whose weights are of these ranks, by module name.

    Raises:
        ValueError: the file is not such a config, or asks for what `load_vsa` does not bring back.
    """
    return lora_config(read_json(file), ranks, str(file))


def lora_config(values: Mapping[str, Any], ranks: Mapping[str, int], source: str) -> Any:
    """The same, from the config's values; `source` is named in errors."""
    from peft import LoraConfig

    defaults = LoraConfig().to_dict()
    known = ("lora_alpha", "lora_dropout", "alpha_pattern", "init_lora_weights", *_SWITCHES, *_IGNORED)
    foreign = [name for name, value in values.items() if name not in known and value and value != defaults.get(name)]
    if foreign or values.get("peft_type", "LORA") != "LORA":
        told = ", ".join(f"{name}={values[name]!r}"[:80] for name in foreign or ["peft_type"])
        raise ValueError(f"{source} has {told}, which load_vsa cannot bring back; fuse the adapter into the weights.")
    begun = values.get("init_lora_weights", True)
    if not isinstance(begun, bool) and begun not in _INITS:
        raise ValueError(
            f"{source} has init_lora_weights={begun!r}, which changes the weights beside the adapter, so that it does "
            "not suit the stock ones; fuse the adapter into the weights."
        )
    alphas = values.get("alpha_pattern") or {}
    numbers = {"lora_alpha": values.get("lora_alpha", 8), "lora_dropout": values.get("lora_dropout", 0.0)}
    if not isinstance(alphas, dict) or not all(re.fullmatch(r"\^?[\w.]+", name) for name in alphas):
        raise ValueError(f"{source} has an alpha_pattern that is no dict of plain module names; write the names out.")
    for name, value in (numbers | alphas).items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or value < 0 or (name == "lora_dropout" and value >= 1):
            raise ValueError(f"{source} has {name}={value!r}, which is no number that it can be; save it again.")
    for name in _SWITCHES:
        if not isinstance(values.get(name, False), bool):
            raise ValueError(f"{source} has {name}={values[name]!r}, which must be true or false; save it again.")
    usual = max(ranks.values(), key=list(ranks.values()).count)
    return LoraConfig(
        r=usual,
        rank_pattern={re.escape(name): rank for name, rank in ranks.items() if rank != usual},
        target_modules=list(ranks),
        alpha_pattern=alphas,
        **numbers,
        **{name: values.get(name, False) for name in _SWITCHES},
    )


def lora_ranks(shapes: Mapping[str, tuple[int, ...]], source: str) -> dict[str, int]:
    """Rank by module name, from the shapes of a LoRA's weights.

    Raises:
        ValueError: they are not those of a LoRA.
    """
    ranks: dict[str, int] = {}
    for key, shape in shapes.items():
        name, side, _ = key.removeprefix(LORA_PREFIX).partition(".lora_B.weight")
        if side and len(shape) > 1 and shape[1] > 0:
            ranks[name] = shape[1]
    if not ranks:
        raise ValueError(f"{source} holds no LoRA, whose keys look like {LORA_PREFIX}<module>.lora_B.weight.")
    return ranks


def add_lora(transformer: torch.nn.Module, config: Any) -> None:
    """Add an adapter "vsa", untrained."""
    if hasattr(transformer, "add_adapter"):
        transformer.add_adapter(config, adapter_name=ADAPTER)
    else:
        from peft import inject_adapter_in_model

        inject_adapter_in_model(config, transformer, ADAPTER)


def set_lora(transformer: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Give the adapter "vsa" its weights."""
    from peft import set_peft_model_state_dict

    weights = {key.removeprefix(LORA_PREFIX): tensor for key, tensor in tensors.items()}
    set_peft_model_state_dict(transformer, weights, adapter_name=ADAPTER)
