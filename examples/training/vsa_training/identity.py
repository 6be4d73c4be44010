"""Which model something was made with."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

# Values of each parameter that tell one model's weights from another's.
SAMPLED = 64


def module_digest(module: torch.nn.Module) -> str:
    """Equal for modules of equal configurations, parameters' names, sizes and types, and values, as far as sampled."""
    digest = hashlib.sha256(config_digest(module).encode())
    for name, parameter in module.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(parameter.detach().flatten()[:SAMPLED].cpu().float().numpy().tobytes())
    return digest.hexdigest()[:16]


def config_digest(module: torch.nn.Module) -> str:
    """Equal for modules of one class and equal configurations, wherever they were loaded from."""
    config: Any = module.config
    config = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    # What tells of a place, a version or a type is no property of the model.
    left_out = ("transformers_version", "torch_dtype", "dtype")
    kept = {key: value for key, value in config.items() if not str(key).startswith("_") and key not in left_out}
    text = json.dumps([type(module).__name__, kept], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
