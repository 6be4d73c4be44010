"""`to_gate_compress`: the learned weight of the coarse branch. Add, save and load it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file

from .config import INDEX_NAME
from .directories import current_file, read_unchanged
from .files import check_name, check_values, local_directory, opened_tensors, read_json, replaced_file
from .gate_state import GATE, is_plain, mark_trained
from .layouts import plain_name
from .models import require_family
from .trained import SOURCE
from .undo import unchanged_on_error

GATES_NAME = "vsa_gates.safetensors"
_OWN_FILES = (GATES_NAME, f"transformer/{GATES_NAME}")

Gates = dict[str, dict[str, torch.Tensor]]
"""Weight, and bias where the family's gates have one, by the attention module's name."""


def add_gate_compress(transformer: torch.nn.Module) -> list[str]:
    """Add a zero-initialised `to_gate_compress` to every video self-attention that has none.

    A gate is an `nn.Linear` of the query projection's sizes (its input features to `heads * head_dim`), with bias
    (MiniMax-H3's have none, as FastH3's), in the dtype and on the device of the transformer. All zeros means that the
    coarse branch has no weight until it is trained.

    Args:
        transformer: a supported video transformer. Add gates before offloading, casting or `torch.compile`.

    Returns:
        Names of the modules that got a gate.

    Raises:
        ValueError: the transformer is not supported, or its parameters are offloaded.
    """
    added = []
    family = require_family(transformer)
    missing = {
        name: attn for name, attn in family.video_modules(transformer).items() if getattr(attn, GATE, None) is None
    }
    references = {name: _reference(name, attn) for name, attn in missing.items()}
    for name, attn in missing.items():
        reference = references[name]
        like = attn.get_submodule(family.query_projection)
        gate = torch.nn.Linear(
            like.in_features, like.out_features, family.gate_bias, device=reference.device, dtype=reference.dtype
        )
        for parameter in gate.parameters():
            torch.nn.init.zeros_(parameter)
        learns = any(parameter.requires_grad for parameter in like.parameters())
        attn.add_module(GATE, gate.requires_grad_(learns).train(attn.training))
        mark_trained(gate, False)
        added.append(name)
    return added


def save_gates(transformer: torch.nn.Module, path: str | os.PathLike[str]) -> Path:
    """Write the gates as safetensors, with keys such as `blocks.0.attn1.to_gate_compress.weight`.

    The file is replaced as a whole: after any error, or a kill, it is what it was.

    Args:
        transformer: a supported video transformer with gates.
        path: a `.safetensors` file, or a directory, which is created and gets `vsa_gates.safetensors`.

    Returns:
        The file that was written.

    Raises:
        ValueError: there are no gates, or they cannot be read here (offloaded, quantised or spread over processes), or
            are not finite.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, attn in require_family(transformer).video_modules(transformer).items():
        gate = getattr(attn, GATE, None)
        if gate is not None:
            _check_plain(f"{name}.{GATE}", gate, "saved")
            tensors |= {f"{name}.{GATE}.{key}": value.contiguous() for key, value in gate.state_dict().items()}
    if not tensors:
        raise ValueError(
            f"{type(transformer).__name__} has no gates to save; add_gate_compress(transformer) adds new ones."
        )
    for key, tensor in tensors.items():
        check_values(key, tensor, type(transformer).__name__)
    file = Path(path)
    if file.suffix != ".safetensors":
        file = file / GATES_NAME
    file.parent.mkdir(parents=True, exist_ok=True)
    with replaced_file(file) as partial:
        save_file(tensors, partial, metadata={"format": "pt"})
    return file


def load_gates(transformer: torch.nn.Module, path_or_repo: str | os.PathLike[str]) -> list[str]:
    """Load gates, adding `to_gate_compress` where it is missing. Call `enable_vsa` afterwards.

    Reads what `save_gates` wrote, whole transformer checkpoints that contain gates (those of `save_pretrained`, in one
    file or sharded), and FastVideo's, which keeps each gate on the block instead of on its attention.

    Args:
        transformer: a supported video transformer. Load gates before offloading or quantising it.
        path_or_repo: a `.safetensors` file, a directory, or a repository on the Hugging Face Hub.

    Returns:
        Names of the modules whose gates were loaded.

    Raises:
        ValueError: no gates found, gates for modules that do not exist, missing ones, sizes that do not fit, values
            that are no finite floating-point numbers or that the gates' dtype cannot hold, or gates that cannot be
            written (offloaded or quantised). After any error nothing is changed.
    """
    found = fitting_gates(transformer, path_or_repo)
    with unchanged_on_error(transformer) as keep:
        set_gates(transformer, found, keep)
        setattr(transformer, SOURCE, str(path_or_repo))
    return list(found)


def set_gates(transformer: torch.nn.Module, found: Gates, keep: Callable[[Iterable[torch.Tensor]], None]) -> None:
    """Write what `fitting_gates` found, adding gates where they are missing; `keep` gets what is overwritten."""
    add_gate_compress(transformer)
    for name, tensors in found.items():
        gate = transformer.get_submodule(f"{name}.{GATE}")
        keep(gate.parameters())
        gate.load_state_dict(tensors)
        mark_trained(gate, any(bool(tensor.any()) for tensor in tensors.values()))


def fitting_gates(transformer: torch.nn.Module, path_or_repo: str | os.PathLike[str]) -> Gates:
    """What `load_gates` would load: weight and bias by the attention module's name. Raises what it raises."""
    family = require_family(transformer)
    modules = family.video_modules(transformer)
    names = {alias: name for name in modules for alias in (name, name.rpartition(".")[0])}
    found: Gates = {}
    unknown = []
    for key, tensor in _read_gates(path_or_repo):
        owner, _, parameter = plain_name(key, family.name).partition(f".{GATE}.")
        parameter = "weight" if parameter == "set_weight" else parameter
        if owner in names and parameter in ("weight", "bias"):
            if parameter in found.setdefault(names[owner], {}):
                raise ValueError(f"{str(path_or_repo)!r} holds {key} twice, under two names; keep one of them.")
            found[names[owner]][parameter] = tensor
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
        expected: dict[str, tuple[int, ...]] = {"weight": (linear.out_features, linear.in_features)}
        if family.gate_bias:
            expected["bias"] = (linear.out_features,)
        shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        if shapes != expected:
            message = f"{name}.{GATE} in {str(path_or_repo)!r} has shapes {shapes}, but needs {expected}."
            raise ValueError(f"{message} {family.foreign_gates}".strip())
        gate = getattr(modules[name], GATE, None)
        if gate is not None:
            _check_plain(f"{name}.{GATE}", gate, "loaded")
        like = _reference(name, modules[name]) if gate is None else gate.weight
        for key, tensor in tensors.items():
            check_values(f"{name}.{GATE}.{key}", tensor, str(path_or_repo), like.dtype)
    return found


def _check_plain(name: str, gate: torch.nn.Module, what: str) -> None:
    parameters = dict(gate.named_parameters())
    if any(parameter.is_meta for parameter in parameters.values()):
        raise ValueError(
            f"{name} has no values here, as offloading leaves it, and cannot be {what}; do so before "
            "enable_sequential_cpu_offload, or after pipe.remove_all_hooks()."
        )
    if not {"weight"} <= parameters.keys() <= {"weight", "bias"} or not all(map(is_plain, parameters.values())):
        kinds = sorted({type(parameter).__name__ for parameter in parameters.values()})
        raise ValueError(
            f"{name} is a {type(gate).__name__} of {', '.join(kinds)} instead of a Linear with a weight (and a bias), "
            f"and cannot be {what}; do so before quantising, sharding or wrapping it."
        )


def _reference(name: str, attn: torch.nn.Module) -> torch.Tensor:
    """A parameter in whose dtype and on whose device the gate computes."""
    for parameter in attn.parameters():
        if parameter.is_meta and any(hasattr(module, "_hf_hook") for module in attn.modules()):
            raise ValueError(
                f"{name} is offloaded, and a gate added now would never get values; add or load gates before "
                "enable_sequential_cpu_offload."
            )
        if parameter.is_floating_point() and parameter.dtype.itemsize > 1:
            return parameter
    raise ValueError(f"{name} has no floating-point parameters to take a dtype from; add gates before quantising.")


def _read_gates(path_or_repo: str | os.PathLike[str]) -> list[tuple[str, torch.Tensor]]:
    path = local_directory(path_or_repo, [*_OWN_FILES, "*.safetensors.index.json", INDEX_NAME])

    def read() -> list[tuple[str, torch.Tensor]]:
        found = []
        for file in _files(path_or_repo, path):
            with opened_tensors(file) as tensors:
                names = [key for key in tensors.keys() if is_gate(key)]  # noqa: SIM118 (safe_open is not a dict)
                found += [(key, tensors.get_tensor(key)) for key in names]
        return found

    return read_unchanged(path, INDEX_NAME, read)


def is_gate(key: str) -> bool:
    """Whether a weight of this name belongs to a gate."""
    return f".{GATE}." in key


def _files(path_or_repo: str | os.PathLike[str], path: Path) -> list[Path]:
    """The safetensors files that may hold gates: the gates' own file if there is one, else some of the checkpoint."""
    if not path.is_dir():
        return [path]
    for name in _OWN_FILES:
        file = current_file(path, INDEX_NAME, name)
        if file.exists():
            return [file]
    return checkpoint_files(path_or_repo, path, is_gate)


def checkpoint_files(
    path_or_repo: str | os.PathLike[str], path: Path, holds: Callable[[str], bool] | None
) -> list[Path]:
    """The files of a transformer's checkpoint that hold some of its weights, downloaded if need be, and no others.

    Args:
        path_or_repo: as it was given.
        path: the same, on this machine; has the indices of shards.
        holds: says by a weight's name whether its file is wanted; `None` wants the index in the shards' place.

    Raises:
        ValueError: the index names files that are not there.
    """
    if not path.is_dir():
        return [path]
    for folder in ("", "transformer/"):
        for index in sorted((path / folder).glob("*.safetensors.index.json")):
            if holds is None:
                return [index]
            shards = sorted({folder + shard for key, shard in weight_map(index).items() if holds(key)})
            local_directory(path_or_repo, shards)
            for shard in shards:
                if not (path / shard).exists():
                    raise ValueError(f"{path / shard} is missing, which {index.name} names; save or download it again.")
            return [path / shard for shard in shards]
    # Of a repository without an index nothing tells what lies where: its transformer, or what lies outside of folders.
    local_directory(path_or_repo, ["transformer/*.safetensors"])
    if not any((path / "transformer").glob("*.safetensors")):
        local_directory(path_or_repo, ["*.safetensors"], ["*/*"])
    return [file for folder in (path, path / "transformer") for file in sorted(folder.glob("*.safetensors"))]


def weight_map(index: Path) -> dict[str, str]:
    """Which file holds each key, by the index of a sharded checkpoint.

    Raises:
        ValueError: it is no such index, or names files outside of its folder.
    """
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict):
        raise ValueError(f'{index} has no "weight_map", so it is no index of shards; save or download it again.')
    return {key: check_name(file, index) for key, file in files.items()}
