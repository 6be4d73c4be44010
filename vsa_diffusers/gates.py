"""`to_gate_compress`: the learned weight of the coarse branch. Add, save and load it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from .models import require_family

GATES_NAME = "vsa_gates.safetensors"
GATE = "to_gate_compress"


def add_gate_compress(transformer: torch.nn.Module) -> list[str]:
    """Add a zero-initialised `to_gate_compress` to every video self-attention that has none.

    A gate is an `nn.Linear` of the query projection's sizes (its input features to `heads * head_dim`), with bias, in
    the dtype and on the device of the transformer. All zeros means that the coarse branch has no weight until it is
    trained.

    Args:
        transformer: a supported video transformer. Add gates before offloading, casting or `torch.compile`.

    Returns:
        Names of the modules that got a gate.

    Raises:
        ValueError: the transformer is not supported.
    """
    added = []
    family = require_family(transformer)
    for name, attn in family.video_modules(transformer).items():
        if getattr(attn, GATE, None) is None:
            reference = next(p for p in attn.parameters() if p.dtype.is_floating_point and p.dtype.itemsize > 1)
            like = attn.get_submodule(family.query_projection)
            gate = torch.nn.Linear(like.in_features, like.out_features, device=reference.device, dtype=reference.dtype)
            torch.nn.init.zeros_(gate.weight)
            torch.nn.init.zeros_(gate.bias)
            attn.add_module(GATE, gate.requires_grad_(like.weight.requires_grad).train(attn.training))
            added.append(name)
    return added


def save_gates(transformer: torch.nn.Module, path: str | os.PathLike[str]) -> Path:
    """Write the gates as safetensors, with keys such as `blocks.0.attn1.to_gate_compress.weight`.

    Args:
        transformer: a supported video transformer with gates.
        path: a `.safetensors` file, or a directory, which is created and gets `vsa_gates.safetensors`.

    Returns:
        The file that was written.

    Raises:
        ValueError: there are no gates.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, attn in require_family(transformer).video_modules(transformer).items():
        gate = getattr(attn, GATE, None)
        if gate is not None:
            tensors |= {f"{name}.{GATE}.{key}": value.contiguous() for key, value in gate.state_dict().items()}
    if not tensors:
        raise ValueError(
            f"{type(transformer).__name__} has no gates to save; add_gate_compress(transformer) adds new ones."
        )
    file = Path(path)
    if file.suffix != ".safetensors":
        file = file / GATES_NAME
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, file, metadata={"format": "pt"})
    return file


def load_gates(transformer: torch.nn.Module, path_or_repo: str | os.PathLike[str]) -> list[str]:
    """Load gates, adding `to_gate_compress` where it is missing. Call `enable_vsa` afterwards.

    Reads what `save_gates` wrote, whole transformer checkpoints that contain gates (those of `save_pretrained`, in one
    file or sharded), and FastVideo's, which keeps each gate on the block instead of on its attention.

    Args:
        transformer: a supported video transformer.
        path_or_repo: a `.safetensors` file, a directory, or a repository on the Hugging Face Hub.

    Returns:
        Names of the modules whose gates were loaded.

    Raises:
        ValueError: no gates found, gates for modules that do not exist, missing ones, or sizes that do not fit; nothing
            was changed then.
    """
    found = fitting_gates(transformer, path_or_repo)
    add_gate_compress(transformer)
    for name, tensors in found.items():
        transformer.get_submodule(f"{name}.{GATE}").load_state_dict(tensors)
    return list(found)


def fitting_gates(
    transformer: torch.nn.Module, path_or_repo: str | os.PathLike[str]
) -> dict[str, dict[str, torch.Tensor]]:
    """What `load_gates` would load: weight and bias by the attention module's name. Raises what it raises."""
    family = require_family(transformer)
    modules = family.video_modules(transformer)
    names = {alias: name for name in modules for alias in (name, name.rpartition(".")[0])}
    found: dict[str, dict[str, torch.Tensor]] = {}
    unknown = []
    for key, tensor in _read_gates(path_or_repo):
        owner, _, parameter = key.partition(f".{GATE}.")
        owner = re.sub(r"^(model\.diffusion_model\.|transformer\.|model\.)", "", owner)
        if owner in names and parameter in ("weight", "bias"):
            found.setdefault(names[owner], {})[parameter] = tensor
        else:
            unknown.append(key)
    if unknown or not found:
        what = f"gates for modules that {type(transformer).__name__} lacks: {unknown[:4]}" if unknown else "no gates"
        raise ValueError(
            f"path_or_repo={str(path_or_repo)!r} holds {what}; keys must look like {next(iter(modules))}.{GATE}.weight."
        )
    missing = [name for name in modules if name not in found and getattr(modules[name], GATE, None) is None]
    if missing:
        raise ValueError(
            f"path_or_repo={str(path_or_repo)!r} has gates for {len(found)} of {len(modules)} modules; missing: "
            f"{missing[:4]}. "
            "To leave those at zero on purpose, call add_gate_compress(transformer) first."
        )
    for name, tensors in found.items():
        linear = modules[name].get_submodule(family.query_projection)
        expected = {"weight": (linear.out_features, linear.in_features), "bias": (linear.out_features,)}
        shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        if shapes != expected:
            message = f"{name}.{GATE} in {str(path_or_repo)!r} has shapes {shapes}, but needs {expected}."
            raise ValueError(f"{message} {family.foreign_gates}".strip())
    return found


def _read_gates(path_or_repo: str | os.PathLike[str]) -> Iterable[tuple[str, torch.Tensor]]:
    for file in _files(path_or_repo):
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 (safe_open is not a dict)
                if f".{GATE}." in key:
                    yield key, tensors.get_tensor(key)


def _files(path_or_repo: str | os.PathLike[str]) -> list[Path]:
    """The safetensors files that may hold gates: the gates' own file if there is one, else all of the checkpoint."""
    path = Path(path_or_repo)
    if path.is_file():
        return [path]
    if not path.exists():
        from huggingface_hub import snapshot_download

        path = Path(snapshot_download(str(path_or_repo), allow_patterns=["*.safetensors", "*.safetensors.index.json"]))
    if (path / GATES_NAME).exists():
        return [path / GATES_NAME]
    folders = [folder for folder in (path, path / "transformer") if folder.is_dir()]
    for index in (file for folder in folders for file in folder.glob("*.safetensors.index.json")):
        weights = json.loads(index.read_text())["weight_map"]
        return sorted({index.parent / file for key, file in weights.items() if f".{GATE}." in key})
    return [file for folder in folders for file in sorted(folder.glob("*.safetensors"))]
