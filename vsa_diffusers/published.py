"""Published checkpoints with VSA as they lie: FastVideo's Wan and MiniMax-H3 trees, LoRA files and LTX-2 gates.

What is planned here from names, sizes and headers is loaded by `load_vsa`, all of it or nothing.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .config import CONFIG_NAME, INDEX_NAME, VSAConfig, make_config
from .files import check_fits, check_values, local_directory, opened_tensors, read_json
from .gate_state import GATE
from .gates import Gates, checkpoint_files, fitting_gates, is_gate
from .layouts import plain_name, why_foreign
from .models import require_family
from .pipeline import supported_parts
from .processor import TRAINED_BLOCK_SIZE
from .tiles import check_video_shape
from .trained import Trained, origins, trained_as

CONTRACT_NAME = "fastvideo_inference.json"
ADAPTER_NAME = "adapter_model.safetensors"
SMALL = (INDEX_NAME, CONFIG_NAME, CONTRACT_NAME, "adapter_manifest.json", "*.safetensors.index.json")
ROUNDINGS = ("tiles", "tokens")
_LORA_FORMAT = "fastvideo-lora-v2"
_CONTRACT = "fasth3-inference-contract-v1"
_LORA_KEY = re.compile(r"(.+)\.(lora_A\.weight|lora_B\.weight|diff|diff_b|set_weight)")
_LORA_KINDS = ("lora_A", "lora_B", "diff", "diff_b", "set_weight")
_REFUSED_NAMES = (
    (r"omniref", "its tiles have 128 tokens and its references are sparse, which is another operation"),
    (r"turbodiffusion|turbowan|(?<![a-z])(sage)?sla(?![a-z])", "sparse-linear attention (SLA) is another operation"),
    (r"veda", "it selects tiles by learned scores, which is another operation"),
    (r"qad(?![a-z])|nvfp4|fp8", "its weights are quantised in a format of its own; take the repository in bf16"),
)


@dataclass
class Published:
    """What will be loaded from a published checkpoint into one transformer.

    Args:
        transformer: that gets it.
        config: to enable VSA with.
        weights: by the model's names; those that are not there stay.
        gates: by module.
        said: what was found and set, in words.
    """

    transformer: torch.nn.Module
    config: VSAConfig
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    gates: Gates = field(default_factory=dict)
    said: str = ""


def plan_published(
    pipe: Any, path_or_repo: str | os.PathLike[str], changes: Mapping[str, Any], rounding: str, variant: str | None
) -> Published:
    """Work out what `load_vsa` does with a checkpoint that `save_vsa` did not write; nothing is changed.

    Raises:
        ValueError: it is of a kind that cannot be served, or does not fit.
    """
    name = str(path_or_repo)
    refuse_by_name(name)
    path = local_directory(path_or_repo, list(SMALL))
    if path.is_dir() and (path / CONFIG_NAME).exists():
        raise ValueError(f"path_or_repo={name!r} has {CONFIG_NAME}, but lacks {INDEX_NAME}; save or download it again.")
    parts = supported_parts(pipe)
    if len(parts) != 1:
        raise ValueError(
            f"path_or_repo={name!r} is a checkpoint of one transformer, but pipe has {', '.join(parts)}; pass the "
            "transformer that it is for."
        )
    [transformer] = parts.values()
    adapter = _adapter(path_or_repo, path, variant)
    if adapter is not None:
        return _lora(transformer, adapter, changes, rounding)
    sparsity, contract = read_contract(path)
    known = trained_as([name])
    family = require_family(transformer)
    keys = names_of(path_or_repo, path)
    if not keys:
        raise ValueError(
            f"path_or_repo={name!r} lacks {INDEX_NAME} or {CONFIG_NAME}, so save_vsa did not write it, and has no "
            "weights of a transformer, so it is no published checkpoint either."
        )
    if (foreign := why_foreign(keys)) is not None:
        raise ValueError(f"path_or_repo={name!r} cannot be loaded: {foreign}.")
    if not any(map(is_gate, keys)):
        full = " (it was trained with full attention)" if known is not None and known.sparsity is None else ""
        raise ValueError(
            f"path_or_repo={name!r} holds no gates{full}, so nothing in it was trained with VSA; load it with "
            "from_pretrained, and enable_vsa runs it with merge."
        )
    plan = Published(transformer, VSAConfig())
    plan.gates = fitting_gates(transformer, path_or_repo)
    only_gates = all(map(is_gate, keys)) or _is_loaded(transformer, name, path) or family.name == "LTX-2"
    if not only_gates:
        files = checkpoint_files(path_or_repo, path, lambda key: not is_gate(key))
        plan.weights = _whole(transformer, files, family.name, name)
    if sparsity is None and known is not None:
        sparsity = known.sparsity
    plan.config, settings = as_trained(sparsity, changes, rounding)
    what = "gates" if only_gates else "weights and gates"
    sampling = f"; trained for {known.sampling}" if known is not None and known.sampling else ""
    plan.said = f"{name}: {what} of {len(plan.gates)} modules{contract}, {settings}{sampling}"
    return plan


def top_k_by_tokens(video_shape: Sequence[int], sparsity: float, tile_tokens: int = 64) -> int:
    """The number of kept tiles as FastVideo rounded it before July 2026: of the video's tokens, not of its tiles.

    Equal to the present rule where the tiles divide the video evenly; else a few tiles less.
    """
    return max(1, math.ceil((1 - sparsity) * math.prod(check_video_shape(video_shape)) / tile_tokens - 1e-9))


def as_trained(sparsity: float | None, changes: Mapping[str, Any], rounding: str) -> tuple[VSAConfig, str]:
    """The settings of training under the caller's, and what they are in words."""
    config = VSAConfig(block_size=TRAINED_BLOCK_SIZE, combine="gate", selection="mean", schedule="constant")
    said = "sparsity not known, so that top_k_ratio is yours to set"
    if sparsity is not None:
        ratio = round(1 - sparsity, 6)
        config = make_config(config, {"top_k_ratio": ratio})
        said = f"sparsity {sparsity:g} (top_k_ratio={ratio:g})"
    if rounding == "tokens":
        shape = changes.get("video_shape")
        if sparsity is None or shape is None:
            raise ValueError(
                f"rounding={rounding!r} counts the video's tokens, so it needs a known sparsity ({sparsity}) and "
                "video_shape=(T, H, W), the grid of the videos that will be made."
            )
        top_k = top_k_by_tokens(shape, sparsity)
        config = make_config(config, {"top_k": top_k})
        said += f", counted by tokens (top_k={top_k})"
    config = make_config(config, changes)
    return config, f"{said}, blocks of {config.block_size}, combine={config.combine!r}"


def refuse_by_name(path_or_repo: str | os.PathLike[str]) -> None:
    """Raise `ValueError` for what a name alone says cannot be served; only for what `save_vsa` did not write."""
    name = str(path_or_repo)
    known: Trained | None = trained_as([name])
    reason = "" if known is None else known.refused
    own = name.lower().replace("\\", "/").rstrip("/").split("/")[-2:]
    for pattern, why in _REFUSED_NAMES:
        if not reason and not Path(name).exists() and any(re.search(pattern, part) for part in own):
            reason = why
    if reason:
        raise ValueError(f"path_or_repo={name!r} cannot be loaded: {reason}.")


def read_contract(path: Path) -> tuple[float | None, str]:
    """The sparsity that FastH3's contract file states, and a word about it."""
    file = path / CONTRACT_NAME if path.is_dir() else path.with_name(CONTRACT_NAME)
    if not file.is_file():
        return None, ""
    facts = read_json(file)
    odd = [key for key in ("pdd_steps", "vsa_ref_keep_rate") if key in facts]
    if odd:
        raise ValueError(f"{file} has {', '.join(odd)}: sparse references (OmniRef) are another operation.")
    wanted = {"schema_version": _CONTRACT, "attention_backend": "VIDEO_SPARSE_ATTN_H3", "vsa_tile_size": 64}
    for key, value in wanted.items():
        if facts.get(key) != value:
            raise ValueError(f"{file} has {key}={facts.get(key)!r}, but what can be served has {value!r}.")
    sparsity = facts.get("vsa_sparsity")
    if not isinstance(sparsity, float) or not 0 <= sparsity < 1:
        raise ValueError(f"{file} has vsa_sparsity={sparsity!r}, which must be a share of tiles in [0, 1).")
    return sparsity, f" under {CONTRACT_NAME}"


def names_of(path_or_repo: str | os.PathLike[str], path: Path) -> list[str]:
    """Names of all tensors: by the index, or by the headers of the files."""
    names = []
    for file in checkpoint_files(path_or_repo, path, None):
        if file.suffix == ".json":
            names += list(read_json(file).get("weight_map", {}))
        else:
            with opened_tensors(file) as tensors:
                names += list(tensors.keys())
    return names


def _is_loaded(transformer: torch.nn.Module, name: str, path: Path) -> bool:
    """Whether the transformer came from this very checkpoint, so that gates are all that it lacks."""
    folders = {path.resolve(), (path / "transformer").resolve()} if path.is_dir() else {path.parent.resolve()}
    for origin in origins(transformer):
        if origin == name or Path(origin).resolve() in folders or f"models--{name.replace('/', '--')}" in origin:
            return True
    return False


def _whole(transformer: torch.nn.Module, files: Iterable[Path], family: str, source: str) -> dict[str, torch.Tensor]:
    """All weights under the model's names; those of gates are left out."""
    targets = {key: each for key, each in transformer.state_dict().items() if not is_gate(key)}
    weights: dict[str, torch.Tensor] = {}
    for file in files:
        with opened_tensors(file) as tensors:
            for key in tensors.keys():  # noqa: SIM118 (safe_open is not a dict)
                name = plain_name(key, family)
                if is_gate(name):
                    continue
                if name in weights:
                    raise ValueError(f"{source!r} holds {name} twice, the second time as {key}; keep one of them.")
                weights[name] = tensors.get_tensor(key)
    shapes = ({key: tuple(each.shape) for key, each in tensors.items()} for tensors in (targets, weights))
    check_fits(source, *shapes)
    for name, tensor in weights.items():
        check_values(name, tensor, source, targets[name].dtype)
    return weights


def _adapter(path_or_repo: str | os.PathLike[str], path: Path, variant: str | None) -> Path | None:
    """FastH3's LoRA file, if this is one, or a folder or repository of them."""
    if path.is_file():
        return path if _metadata(path).get("format") == _LORA_FORMAT else None
    if variant is not None:
        if not re.fullmatch(r"[\w.-]+", variant) or variant.startswith("."):
            raise ValueError(f"variant={variant!r} must be the name of a folder, such as 'vsa-datafree'.")
        file = local_directory(path_or_repo, [f"{variant}/{ADAPTER_NAME}"]) / variant / ADAPTER_NAME
        if not file.is_file():
            raise ValueError(f"variant={variant!r}: {str(path_or_repo)!r} has no {variant}/{ADAPTER_NAME}.")
        return file
    if (path / ADAPTER_NAME).is_file():
        return path / ADAPTER_NAME
    if (path / "adapter_manifest.json").is_file():
        there = sorted(file.parent.name for file in path.glob(f"*/{ADAPTER_NAME}"))
        raise ValueError(
            f"path_or_repo={str(path_or_repo)!r} holds several adapters{f' ({there})' if there else ''}; pass one as "
            "variant=, such as variant='vsa-datafree'."
        )
    return None


def _metadata(file: Path) -> dict[str, str]:
    with opened_tensors(file) as tensors:
        return tensors.metadata() or {}


def _lora(transformer: torch.nn.Module, file: Path, changes: Mapping[str, Any], rounding: str) -> Published:
    """FastH3's adapter merged into the weights: `W + B A` with factor 1, differences added, gates set; in fp32."""
    metadata = _metadata(file)
    if metadata.get("format") != _LORA_FORMAT:
        raise ValueError(f"{file} has format {metadata.get('format')!r}; FastH3's adapters have {_LORA_FORMAT!r}.")
    kinds, parts = _adapter_parts(file, metadata)
    state = {key: each for key, each in transformer.state_dict().items() if not is_gate(key)}
    changed: dict[str, dict[str, torch.Tensor]] = {}
    for (module, kind), tensor in parts.items():
        name = f"{module}.bias" if kind == "diff_b" else f"{module}.weight"
        if kind == "set_weight":
            continue
        if name not in state:
            raise ValueError(f"{file} has {module}.{kind}, but {type(transformer).__name__} has no {name}.")
        check_values(f"{module}.{kind}", tensor, str(file))
        changed.setdefault(name, {})[kind] = tensor
    weights = {name: _merged(name, state[name], terms, file) for name, terms in changed.items()}
    blocks = {name.split(".")[1] for name in state if name.startswith("transformer_blocks.")}
    untouched = blocks - {name.split(".")[1] for name in changed if name.startswith("transformer_blocks.")}
    if untouched:
        raise ValueError(f"{file} leaves blocks {sorted(untouched, key=int)[:4]} untouched; download it again.")
    plan = Published(transformer, VSAConfig(), weights)
    student = str(metadata.get("finetuned_model", ""))
    known = trained_as([student])
    if kinds["set_weight"]:
        if kinds["set_weight"] != len(blocks):
            raise ValueError(f"{file} has gates for {kinds['set_weight']} of {len(blocks)} blocks; download it again.")
        plan.gates = fitting_gates(transformer, file)
        sparsity = 0.9 if known is None else known.sparsity  # all published adapters with gates have this one
        plan.config, settings = as_trained(sparsity, changes, rounding)
    else:
        plan.config = make_config(VSAConfig(top_k_ratio=1.0, combine="merge", schedule="constant"), changes)
        settings = "trained with full attention, so that all tiles are kept"
    plan.said = f"{file}: {len(weights)} weights of {student or 'an adapter'} merged, {settings}"
    return plan


def _adapter_parts(
    file: Path, metadata: Mapping[str, str]
) -> tuple[dict[str, int], dict[tuple[str, str], torch.Tensor]]:
    """How many tensors of each kind there are, and they by module and kind, of an adapter that is whole."""
    parts: dict[tuple[str, str], torch.Tensor] = {}
    with opened_tensors(file) as tensors:
        for key in tensors.keys():  # noqa: SIM118 (safe_open is not a dict)
            match = _LORA_KEY.fullmatch(key)
            if match is None or (match[2] == "set_weight") != match[1].endswith(f".{GATE}"):
                raise ValueError(f"{file} has {key}, which is no part of an adapter of format {_LORA_FORMAT!r}.")
            parts[match[1], match[2].removesuffix(".weight")] = tensors.get_tensor(key)
    for module, kind in parts:
        other = {"lora_A": "lora_B", "lora_B": "lora_A"}.get(kind)
        if other is not None and (module, other) not in parts:
            raise ValueError(f"{file} has {module}.{kind} without {other}; download it again.")
    kinds = {
        kind: sum(each == kind for _, each in parts) for kind in ("lora_A", "lora_B", "diff", "diff_b", "set_weight")
    }
    counts = {
        "low_rank_tensors": kinds["lora_A"] + kinds["lora_B"],
        "diff_tensors": kinds["diff"] + kinds["diff_b"],
        "set_weight_tensors": kinds["set_weight"],
    }
    for name, count in counts.items():
        if metadata.get(name) != str(count):
            raise ValueError(f"{file} says {name}={metadata.get(name)!r}, but holds {count}; download it again.")
    return kinds, parts


def _merged(name: str, weight: torch.Tensor, terms: Mapping[str, torch.Tensor], file: Path) -> torch.Tensor:
    if not weight.is_floating_point() or weight.dtype.itemsize < 2:
        raise ValueError(f"{name} is {weight.dtype}, into which nothing can be merged; load before quantising.")
    total = weight.detach().float().cpu()
    try:
        if "lora_A" in terms:
            total = total + terms["lora_B"].float() @ terms["lora_A"].float()
        for kind in ("diff", "diff_b"):
            if kind in terms:
                if terms[kind].shape != weight.shape:
                    raise RuntimeError(f"{kind} has the shape {tuple(terms[kind].shape)}")
                total = total + terms[kind].float()
    except RuntimeError as error:
        raise ValueError(f"{file} does not fit {name} {tuple(weight.shape)}: {error}.") from error
    if total.shape != weight.shape:
        raise ValueError(f"{file} does not fit {name} {tuple(weight.shape)}: it makes {tuple(total.shape)}.")
    return total.to(weight.dtype)
