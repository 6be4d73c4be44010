"""`convert`: a published checkpoint as `save_vsa` writes them, and what it wrote in FastVideo's layout.

Tensors are copied shard by shard as they are, so that memory holds one shard, and the gates, at a time.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from .attention import check_choice
from .config import CONFIG_NAME, INDEX_NAME, VSAConfig
from .directories import SavedDirectory, read_directory, replaced_directory
from .files import check_values, local_directory, opened_tensors, read_json
from .gate_state import GATE
from .gates import GATES_NAME, checkpoint_files, is_gate
from .layouts import plain_name, why_foreign
from .pretrained import FORMAT, WEIGHTS_NAME, saved_components, weight_files
from .published import SMALL, as_trained, names_of, read_contract, refuse_by_name
from .trained import trained_as

LAYOUTS = ("vsa", "fastvideo")
CONVERTED_NAME = "vsa_converted.json"
SHARD_BYTES = 5 * 10**9
_CLASSES = (
    (rf"transformer_blocks\.\d+\.attn\.{GATE}\.", "MiniMaxH3Transformer3DModel"),
    (rf"transformer_blocks\.\d+\.attn1\.{GATE}\.", "LTX2VideoTransformer3DModel"),
    (rf"blocks\.\d+\.(attn1\.|self_attn\.)?{GATE}\.", "WanTransformer3DModel"),
)


@dataclass(frozen=True)
class Converted:
    """What `convert` wrote.

    Args:
        directory: where.
        layout: "vsa" or "fastvideo".
        model: class of the transformer.
        tensors: how many, gates included.
        gates: of how many modules.
        shards: files with weights that are not gates alone.
        said: the settings that came with it, or were left behind.
    """

    directory: str
    layout: str
    model: str
    tensors: int
    gates: int
    shards: int
    said: str

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"{self.directory}: {self.model}, {self.tensors} tensors in {self.shards} shards, gates of {self.gates} "
            f"modules; {self.said}."
        )


@dataclass(frozen=True)
class _Tensor:
    """A tensor that will be copied: its new name, where it is, and its size in bytes."""

    name: str
    file: Path
    key: str
    size: int


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    to: str = "vsa",
    shard_bytes: int = SHARD_BYTES,
    **changes: Any,
) -> Converted:
    """Write a published checkpoint as `save_vsa` does, or what `save_vsa` wrote in FastVideo's layout.

    No tensor changes. Killed or out of disk at any moment, the target is what it was or what it shall be.

    Args:
        source: a directory, or with `to="vsa"` a file or a repository on the Hugging Face Hub.
        target: a directory, which is created if need be.
        to: `"vsa"`: from a published checkpoint to what `load_vsa` reads fastest, with a config. `"fastvideo"`: from
            what `save_vsa` wrote to shards with an index, in diffusers' names, and Wan's gates on the block.
        shard_bytes: the size of files with weights.
        changes: fields of `VSAConfig` to override in the config, with `to="vsa"`.

    Raises:
        ValueError: the source is not one, cannot be served (with the reason), or holds values that are not finite.
    """
    check_choice("to", to, LAYOUTS)
    if Path(source).exists() and Path(target).exists() and Path(source).resolve() == Path(target).resolve():
        raise ValueError(f"target={str(target)!r} is the source; choose another directory.")
    if to == "vsa":
        return _to_vsa(source, Path(target), shard_bytes, changes)
    if changes:
        raise ValueError(f"to={to!r} writes no settings, so {', '.join(changes)} cannot be set.")
    return _to_fastvideo(Path(source), Path(target), shard_bytes)


def _to_vsa(source: str | os.PathLike[str], target: Path, shard_bytes: int, changes: Mapping[str, Any]) -> Converted:
    name = str(source)
    path = local_directory(source, [*SMALL, "transformer/config.json"])
    if path.is_dir() and (path / INDEX_NAME).exists():
        raise ValueError(f"source={name!r} was written by save_vsa already; load_vsa reads it as it is.")
    refuse_by_name(source)
    keys = names_of(source, path)
    if (foreign := why_foreign(keys)) is not None:
        raise ValueError(f"source={name!r} cannot be converted: {foreign}.")
    model = _class(path, keys)
    if model is None:
        raise ValueError(
            f"source={name!r} holds no gates of Wan, MiniMax-H3 or LTX-2, so there is nothing to convert; adapters are "
            "merged by load_vsa and written by save_vsa."
        )
    known = trained_as([name])
    sparsity, _ = read_contract(path)
    if sparsity is None and known is not None:
        sparsity = known.sparsity
    config, said = as_trained(sparsity, changes, "tiles")
    family = "Wan" if model.startswith("Wan") else ""
    tensors = _listed(checkpoint_files(source, path, lambda key: True), lambda key: plain_name(key, family), name)
    gates = [each for each in tensors if is_gate(each.name)]
    weights = [] if model.startswith("LTX2") else [each for each in tensors if not is_gate(each.name)]
    facts = {"class": model, "contents": "full" if weights else "gates", "gates": True}
    with replaced_directory(target, INDEX_NAME, {"format": FORMAT, "components": {"transformer": facts}}) as folder:
        (folder / "transformer").mkdir()
        _write(gates, folder / "transformer" / GATES_NAME)
        shards = _write_shards(weights, folder / "transformer", shard_bytes)
        config.save_pretrained(folder)
    return Converted(str(target), "vsa", model, len(gates) + len(weights), _modules(gates), shards, said)


def _to_fastvideo(source: Path, target: Path, shard_bytes: int) -> Converted:
    if not (source / INDEX_NAME).is_file():
        raise ValueError(f"source={str(source)!r} lacks {INDEX_NAME}, so save_vsa did not write it.")
    with replaced_directory(target, CONVERTED_NAME, {"from": "save_vsa"}) as folder:

        def convert(saved: SavedDirectory) -> Converted:
            files, facts, config = _saved(saved)
            model = facts["class"]
            tensors = _listed(files, _published if model.startswith("Wan") else str, str(source))
            shutil.rmtree(folder / "transformer", ignore_errors=True)  # of an attempt while `source` was replaced
            (folder / "transformer").mkdir()
            shards = _write_shards(tensors, folder / "transformer", shard_bytes, always_index=True)
            gates = [each for each in tensors if is_gate(each.name)]
            said = f"FastVideo takes the sparsity ({1 - config.top_k_ratio:g} here) as an argument"
            return Converted(str(target), "fastvideo", model, len(tensors), _modules(gates), shards, said)

        return read_directory(source, INDEX_NAME, convert)


def _published(key: str) -> str:
    """FastVideo's name of one of Wan's weights."""
    return re.sub(rf"^((?:vace_)?blocks\.\d+\.)attn1\.({GATE}\.)", r"\1\2", key)


def _saved(saved: SavedDirectory) -> tuple[list[Path], dict[str, Any], VSAConfig]:
    """The files of the one transformer that was saved, with its facts, and the config."""
    components = saved_components(saved)
    if len(components) != 1:
        raise ValueError(f"{saved.path} holds {', '.join(components)}, but FastVideo's layout has one transformer.")
    [(name, facts)] = components.items()
    if facts["contents"] == "lora":
        raise ValueError(f"{saved.path} holds a LoRA; load it with load_vsa, fuse it, and save it again before.")
    files = weight_files(saved, name) if facts["contents"] == "full" else []
    if facts["gates"]:
        files.append(saved.file(f"{name}/{GATES_NAME}"))
    return files, facts, VSAConfig.from_file(saved.file(CONFIG_NAME))


def _class(path: Path, keys: Sequence[str]) -> str | None:
    """The transformer's class: what its config says, or the names of its gates."""
    by_gates = next((name for pattern, name in _CLASSES if any(re.search(pattern, key) for key in keys)), None)
    file = path / "transformer" / "config.json"
    if by_gates is not None and path.is_dir() and file.is_file():
        name = read_json(file).get("_class_name")
        if isinstance(name, str) and name.isidentifier():
            return name
    return by_gates


def _listed(files: Iterable[Path], rename: Any, source: str) -> list[_Tensor]:
    """All tensors, from the headers of the files."""
    found: dict[str, _Tensor] = {}
    for file in files:
        with opened_tensors(file) as tensors:
            for key in tensors.keys():  # noqa: SIM118 (safe_open is not a dict)
                name = rename(key)
                if name in found:
                    raise ValueError(f"{source!r} holds {name} twice, the second time as {key}; keep one of them.")
                part = tensors.get_slice(key)
                size = _BYTES.get(re.sub(r"_.*", "", part.get_dtype()), 8)
                for extent in part.get_shape():
                    size *= extent
                found[name] = _Tensor(name, file, key, size)
    return list(found.values())


_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "F8": 1, "I8": 1, "U8": 1, "BOOL": 1}


def _write(tensors: Sequence[_Tensor], file: Path) -> None:
    held = {}
    for source in dict.fromkeys(each.file for each in tensors):
        with opened_tensors(source) as opened:
            for each in tensors:
                if each.file == source:
                    held[each.name] = opened.get_tensor(each.key)
                    if held[each.name].is_floating_point():
                        check_values(each.key, held[each.name], str(source))
    save_file(held, file, metadata={"format": "pt"})


def _write_shards(tensors: Sequence[_Tensor], folder: Path, shard_bytes: int, always_index: bool = False) -> int:
    """Files of about this size, and their index where there are several; returns how many."""
    groups: list[list[_Tensor]] = []
    room = 0
    for each in tensors:
        if not groups or each.size > room:
            groups.append([])
            room = shard_bytes
        groups[-1].append(each)
        room -= each.size
    stem, suffix = WEIGHTS_NAME.split(".")
    names = [f"{stem}-{n + 1:05}-of-{len(groups):05}.{suffix}" for n in range(len(groups))]
    if len(groups) == 1 and not always_index:
        names = [WEIGHTS_NAME]
    for name, group in zip(names, groups, strict=True):
        _write(group, folder / name)
    if len(groups) > 1 or (groups and always_index):
        files = {each.name: name for name, group in zip(names, groups, strict=True) for each in group}
        total = {"total_size": sum(each.size for each in tensors)}
        (folder / f"{WEIGHTS_NAME}.index.json").write_text(
            json.dumps({"metadata": total, "weight_map": files}, indent=2)
        )
    return len(groups)


def _modules(gates: Sequence[_Tensor]) -> int:
    return len({each.name.partition(f".{GATE}.")[0] for each in gates})
