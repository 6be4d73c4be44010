"""Checkpoints that were trained with VSA: what they were trained with, and warnings where a model runs otherwise.

`from_pretrained` drops gates, since diffusers' models have none. What tells them afterwards is where a model comes
from, which diffusers keeps in its config, and where `load_gates` took gates from.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .config import INDEX_NAME, VSAConfig
from .files import opened_tensors, read_json
from .gate_state import GATE
from .processor import TRAINED_BLOCK_SIZE

logger = logging.getLogger(__name__)

INDEX_NAMES = ("diffusion_pytorch_model.safetensors.index.json", "model.safetensors.index.json")
WHOLE_NAMES = ("diffusion_pytorch_model.safetensors", "model.safetensors")
SOURCE = "_vsa_gates_from"
_SAYS_VSA = re.compile(r"(?<![a-z])vsa(?![a-z])|video_sparse_attn|to_gate_compress")


@dataclass(frozen=True)
class Trained:
    """What a published checkpoint was trained with.

    Args:
        repositories: names on the hub, of the owner FastVideo.
        sparsity: share of key tiles that a query tile leaves out; `None` where it was trained with full attention.
        sampling: steps, shift and guidance, in words.
        refused: why it cannot run here; empty where it can.
    """

    repositories: tuple[str, ...]
    sparsity: float | None
    sampling: str = ""
    refused: str = ""

    @property
    def top_k_ratio(self) -> float | None:
        """The share of key tiles that is kept."""
        return None if self.sparsity is None else round(1 - self.sparsity, 6)


_DMD = "3 DMD steps at timesteps 1000, 757 and 522, fresh noise in each, no guidance"
_FOUR = "4 forwards, video shift 12, audio shift 3, no guidance"
_EIGHT = "8 forwards, video shift 10, audio shift 3, no guidance"
_QUANTISED = "its weights are quantised in a format of its own; use FastVideo-FastH3-8-Step-V2"
_COMFY = "it has ComfyUI's names and fused projections; use FastVideo-FastH3-8-Step-V2, which has diffusers'"
TRAINED = (
    Trained(("FastWan2.1-T2V-1.3B-Diffusers",), 0.8, _DMD),
    Trained(("FastWan2.1-T2V-14B-Diffusers", "FastWan2.1-T2V-14B-480P-Diffusers"), 0.9, _DMD),
    Trained(("Wan2.1-VSA-T2V-14B-720P-Diffusers",), 0.9, "50 steps, shift 5, guidance 5"),
    Trained(("FastWan2.2-TI2V-5B-FullAttn-Diffusers",), None, _DMD),
    Trained(
        (
            "FastVideo-FastH3-4-step-Preview-v1-VSA-DataFree", "FastVideo-FastH3-4-step-v1",
            "FastVideo-FastH3-4-step-Preview-v1-VSA-Synthetic-Step1300",
            "FastVideo-FastH3-4-step-Preview-v1-VSA-Synthetic-Step1900", "FastVideo-FastH3-4-step-v1.2",
            "FastVideo-Minimax-FastH3-Preview-v0.1", "FastVideo-Minimax-FastH3-Preview-v0.2",
        ),
        0.9, _FOUR,
    ),
    Trained(("FastVideo-FastH3-4-step-Preview-v1-LoRA",), 0.9, _FOUR),
    Trained(
        ("FastVideo-FastH3-4-step-Preview-v1-Dense-DataFree", "FastVideo-FastH3-Dense-4-step-v1"), None, _FOUR
    ),
    Trained(("FastVideo-FastH3-8-Step-V2",), 0.8, _EIGHT),
    Trained(("FastVideo-FastH3-8-Step-V2-FP8", "FastH3-QAD-v2"), 0.8, _EIGHT, _QUANTISED),
    Trained(("FastVideo-FastH3-Comfy", "FastVideo-FastH3"), 0.8, _EIGHT, _COMFY),
    Trained(
        ("FastVideo-FastH3-Trim-8-Step",), 0.8, _EIGHT,
        "it has 42 blocks and low-rank modulations, which diffusers' MiniMaxH3Transformer3DModel has not",
    ),
)  # fmt: skip
"""As model cards and FastVideo's code say; see docs/checkpoints.md. Real weights were not at hand."""


def trained_as(names: Iterable[str]) -> Trained | None:
    """What is known of the first of these repositories or paths that is known."""
    for name in names:
        parts = {part.lower() for part in re.split(r"/|\\|--", name)}
        for trained in TRAINED:
            if parts & {repository.lower() for repository in trained.repositories}:
                return trained
    return None


def origins(transformer: torch.nn.Module) -> list[str]:
    """Where a transformer's gates and weights were loaded from, as far as that is known."""
    found = [vars(transformer).get(SOURCE), _config(transformer).get("_name_or_path")]
    return [str(name) for name in found if name]


def gates_lie_at(name: str) -> bool:
    """Whether a local folder, or a repository in the hub's cache, holds a transformer with gates; reads no tensors."""
    return any(f".{GATE}." in key for key in _keys(name))


def warn_of_lost_gates(
    label: str, transformer: torch.nn.Module, modules: Mapping[str, torch.nn.Module], configs: Mapping[str, VSAConfig]
) -> None:
    """Warn where "merge" runs a model that was trained with gates, but has none.

    Args:
        label: the transformer's name in messages.
        transformer: what runs.
        modules: its video self-attention.
        configs: of those that are sparse, choices settled.
    """
    if not any(each.combine == "merge" for each in configs.values()):
        return
    if any(getattr(modules[name], GATE, None) is not None for name in configs):
        return
    for name in origins(transformer):
        known = trained_as([name])
        if known is not None and known.sparsity is None:
            return
        told = "its files hold gates" if gates_lie_at(name) else "its name says that it was trained with VSA"
        if told.startswith("its files") or known is not None or _says_vsa(name):
            _warn_lost(label, name, told)
            return
    said = [key for key, value in _config(transformer).items() if _SAYS_VSA.search(f"{key} {value}".lower())]
    said = [key for key in said if not key.startswith("_")]
    if said:
        _warn_lost(label, str(_config(transformer).get("_name_or_path") or "the checkpoint"), f"its config has {said}")


def warn_of_other_settings(label: str, transformer: torch.nn.Module, configs: Mapping[str, VSAConfig]) -> None:
    """Warn where gates run with other settings than the checkpoint was trained with."""
    known = trained_as(origins(transformer))
    gated = [each for each in configs.values() if each.combine == "gate"]
    if known is None or known.top_k_ratio is None or not gated:
        return
    first = gated[0]
    others = {
        "top_k_ratio": (known.top_k_ratio, None if first.top_k is not None else first.top_k_ratio),
        "block_size": (TRAINED_BLOCK_SIZE, first.block_size),
        "selection": ("mean", first.selection),
        "schedule": ("constant", first.schedule),
    }
    told = [
        f"{name}={used!r} (trained: {wanted!r})"
        for name, (wanted, used) in others.items()
        if used is not None and not _same(wanted, used)
    ]
    if told:
        logger.warning(
            "%s: %s was not trained for %s; load_vsa(pipe, path_or_repo) sets what it was trained for.",
            label, known.repositories[0], ", ".join(told),
        )  # fmt: skip


def _warn_lost(label: str, name: str, told: str) -> None:
    logger.warning(
        '%s: %s, but the model has none, and combine="merge" stands in, for which %s was not trained; '
        "load_vsa(pipe, %r) loads them.",
        label, told if "gates" in told else f"{told}, with gates", name, name,
    )  # fmt: skip


def _says_vsa(name: str) -> bool:
    """Whether a name's last part, or that of a repository in the cache, says so; what `save_vsa` wrote does not."""
    path = Path(name)
    if any((folder / INDEX_NAME).exists() for folder in (path, path.parent)):
        return False
    repository = next((part for part in path.parts if part.startswith("models--")), None)
    own = [part for part in path.parts if not part.startswith("transformer")]
    return bool(_SAYS_VSA.search((repository or "".join(own[-1:])).lower()))


def _same(wanted: Any, used: Any) -> bool:
    if isinstance(wanted, float) and isinstance(used, float):
        return math.isclose(wanted, used, rel_tol=1e-6)
    return bool(wanted == used)


def _config(transformer: torch.nn.Module) -> Mapping[str, Any]:
    config = getattr(transformer, "config", None)
    return config if isinstance(config, Mapping) else {}


def _keys(name: str) -> Iterable[str]:
    for folder in ("", "transformer"):
        for index in INDEX_NAMES:
            file = _cached(name, folder, index)
            if file is not None:
                files = read_json(file).get("weight_map")
                yield from files if isinstance(files, dict) else ()
        for whole in WHOLE_NAMES:
            file = _cached(name, folder, whole)
            if file is not None:
                with opened_tensors(file) as tensors:
                    yield from tensors.keys()


def _cached(name: str, folder: str, file: str) -> Path | None:
    """A file of a local folder, or of a repository as far as the hub's cache has it; nothing is downloaded."""
    if Path(name).is_dir():
        path = Path(name) / folder / file
        return path if path.is_file() else None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, f"{folder}/{file}" if folder else file)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None
