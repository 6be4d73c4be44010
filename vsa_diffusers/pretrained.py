"""`save_vsa` and `load_vsa`: what training changed, as a directory that brings it back on a stock pipeline.

vsa_config.json                                  the VSAConfig
vsa_index.json                                   which components there are, and what is saved of each
<component>/vsa_gates.safetensors                gates, if there are some
<component>/diffusion_pytorch_model.safetensors  all other weights, perhaps in shards ("full")
<component>/pytorch_lora_weights.safetensors     or a LoRA, and its adapter_config.json ("lora")
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from .attention import check_choice
from .config import CONFIG_NAME, VSAConfig, make_config
from .gates import GATE, GATES_NAME, fitting_gates, load_gates
from .pipeline import PipelineOrTransformer, enable_vsa, enabled_config, supported_parts

INDEX_NAME = "vsa_index.json"
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
LORA_NAME = "pytorch_lora_weights.safetensors"
LORA_PREFIX = "transformer."  # what `load_lora_weights` of diffusers' pipelines expects
ADAPTER = "vsa"
CONTENTS = ("full", "lora", "gates")
_FORMAT = 1

Tensors = Mapping[str, torch.Tensor]


def save_vsa(
    pipe: Any,
    directory: str | os.PathLike[str],
    *,
    contents: str = "auto",
    config: VSAConfig | None = None,
    dtype: torch.dtype | None = None,
    state_dict: Tensors | None = None,
    max_shard_size: str = "5GB",
) -> Path:
    """Write what `load_vsa` needs to bring a fine-tuned model back: weights or a LoRA, gates, and the config.

    Args:
        pipe: a pipeline (every video transformer in it), or a transformer.
        directory: is created if need be; files of these names in it are replaced.
        contents: `"full"`: all weights. `"lora"`: those of the peft adapter. `"gates"`: the gates alone. `"auto"`:
            "lora" where there is an adapter, else "full". Gates are saved always.
        config: saved with them; `None` takes the one that VSA was enabled with.
        dtype: floating-point tensors are saved in this; `None` keeps theirs.
        state_dict: a transformer's whole state dict, where its own is spread over several processes.
        max_shard_size: of the files with all weights, as in `save_pretrained`.

    Returns:
        The directory.

    Raises:
        ValueError: there is nothing of that kind to save, VSA is not enabled and no config was given, or it was enabled
            with the pattern form.
    """
    parts = supported_parts(pipe)
    if state_dict is not None and len(parts) > 1:
        raise ValueError(f"state_dict= is one transformer's, but pipe has {', '.join(parts)}; pass one transformer.")
    check_choice("contents", contents, ("auto", *CONTENTS))
    config = config or _config_of(parts)
    saves = [
        _Save.make(name, part, part.state_dict() if state_dict is None else state_dict, contents)
        for name, part in parts.items()
    ]
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    for save in saves:
        save.write(path / save.name, dtype, max_shard_size)
    index = {"format": _FORMAT, "components": {save.name: save.description() for save in saves}}
    (path / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
    config.save_pretrained(path)
    return path


def load_vsa(
    pipe: PipelineOrTransformer, path_or_repo: str | os.PathLike[str], **changes: Any
) -> PipelineOrTransformer:
    """Bring what `save_vsa` wrote back on a stock pipeline or transformer, and enable VSA as it was trained.

        pipe = WanPipeline.from_pretrained(...)
        load_vsa(pipe, "my_training/final")

    Load before offloading, compiling or quantising. A LoRA becomes the adapter "vsa".

    Args:
        pipe: a pipeline with the video transformers that were saved, or the transformer if there was one.
        path_or_repo: a directory, or a repository on the Hugging Face Hub.
        changes: fields of `VSAConfig` to override, such as `top_k_ratio=0.3`.

    Returns:
        `pipe` itself.

    Raises:
        ValueError: not such a directory, other components or another class than were saved, missing or unexpected keys,
            or sizes that do not fit; no weight was changed then.
    """
    path = _local(path_or_repo)
    index = _read_index(path)
    config = make_config(VSAConfig.from_pretrained(path), changes)
    parts = supported_parts(pipe)
    saved = index["components"]
    if isinstance(pipe, torch.nn.Module) and len(saved) == 1:
        parts = dict(zip(saved, parts.values(), strict=True))
    if parts.keys() != saved.keys():
        raise ValueError(
            f"{str(path_or_repo)!r} holds {', '.join(saved)}, but pipe has {', '.join(parts)}; pass the pipeline that "
            "it was trained for, or one transformer if only one was saved."
        )
    loads = [_Load(part, path / name, saved[name]) for name, part in parts.items()]
    for load in loads:
        load.check()
    for load in loads:
        load.apply()
    return enable_vsa(pipe, config=config)


@dataclass
class _Save:
    """What will be written of one transformer, worked out before anything is."""

    name: str
    transformer: torch.nn.Module
    contents: str
    gates: Tensors
    weights: Tensors
    adapter: Any = None

    @classmethod
    def make(cls, name: str, transformer: torch.nn.Module, state_dict: Tensors, contents: str) -> _Save:
        adapters = getattr(transformer, "peft_config", {})
        if contents == "auto":
            contents = "lora" if adapters else "full"
        kind = _kind(transformer)
        if contents == "lora" and len(adapters) != 1:
            raise ValueError(f'contents="lora" saves one peft adapter, but {kind} has {list(adapters) or "none"}.')
        if contents == "full" and adapters:
            raise ValueError(
                f'contents="full", but {kind} has the adapter {list(adapters)}; fuse it into the weights with '
                'fuse_lora() and unload_lora(), or save it with contents="lora".'
            )
        gates = {key: tensor for key, tensor in state_dict.items() if _is_gate(key)}
        if contents == "gates" and not gates:
            raise ValueError(f'contents="gates", but {kind} has none; add_gate_compress(transformer) adds new ones.')
        weights, adapter = {}, None
        if contents == "full":
            weights = {key: tensor for key, tensor in state_dict.items() if not _is_gate(key)}
        if contents == "lora":
            from peft import get_peft_model_state_dict

            [(adapter_name, adapter)] = adapters.items()
            weights = get_peft_model_state_dict(transformer, dict(state_dict), adapter_name=adapter_name)
        return cls(name, transformer, contents, gates, weights, adapter)

    def description(self) -> dict[str, Any]:
        return {"class": _kind(self.transformer), "contents": self.contents, "gates": bool(self.gates)}

    def write(self, folder: Path, dtype: torch.dtype | None, max_shard_size: str) -> None:
        folder.mkdir(exist_ok=True)
        for old in (*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")):
            old.unlink()
        if self.gates:
            save_file(_ready(self.gates, dtype), folder / GATES_NAME, metadata={"format": "pt"})
        if self.contents == "lora":
            weights = {LORA_PREFIX + key: tensor for key, tensor in self.weights.items()}
            save_file(_ready(weights, dtype), folder / LORA_NAME, metadata={"format": "pt"})
            self.adapter.save_pretrained(folder)
        if self.contents == "full":
            from huggingface_hub import save_torch_state_dict

            stem, suffix = WEIGHTS_NAME.split(".")
            pattern = f"{stem}{{suffix}}.{suffix}"
            weights = _ready(self.weights, dtype)
            save_torch_state_dict(weights, folder, filename_pattern=pattern, max_shard_size=max_shard_size)


@dataclass
class _Load:
    """One transformer, and the folder that holds what was saved of it."""

    transformer: torch.nn.Module
    folder: Path
    description: Mapping[str, Any]

    def check(self) -> None:
        """Raise `ValueError` unless everything in the folder fits the transformer."""
        kind = _kind(self.transformer)
        if kind != self.description["class"]:
            raise ValueError(f"{self.folder} was saved from {self.description['class']}, but pipe has {kind}.")
        if any(parameter.is_meta for parameter in self.transformer.parameters()):
            raise ValueError(f"{kind} has parameters without values, as offloading leaves them; load_vsa comes before.")
        if self.description["contents"] == "full":
            expected = {key: tuple(value.shape) for key, value in _without_gates(self.transformer).items()}
            _compare(self.folder, expected, _shapes(self._weight_files()))
        if self.description["contents"] == "lora":
            self._check_lora()
        if self.description["gates"]:
            fitting_gates(self.transformer, self._existing(GATES_NAME))

    def apply(self) -> None:
        if self.description["contents"] == "full":
            for file in self._weight_files():
                self.transformer.load_state_dict(load_file(file), strict=False)
        if self.description["contents"] == "lora":
            _add_lora(self.transformer, self._lora_config())
            _set_lora(self.transformer, load_file(self.folder / LORA_NAME))
        if self.description["gates"]:
            load_gates(self.transformer, self.folder / GATES_NAME)

    def _check_lora(self) -> None:
        if ADAPTER in getattr(self.transformer, "peft_config", {}):
            raise ValueError(
                f'{type(self.transformer).__name__} already has an adapter "{ADAPTER}"; remove it with '
                f'delete_adapters("{ADAPTER}") before loading another.'
            )
        from peft import get_peft_model_state_dict

        skeleton = _skeleton(self.transformer)
        _add_lora(skeleton, self._lora_config())
        state = get_peft_model_state_dict(skeleton, adapter_name=ADAPTER)
        expected = {LORA_PREFIX + key: tuple(tensor.shape) for key, tensor in state.items()}
        _compare(self.folder, expected, _shapes([self._existing(LORA_NAME)]))

    def _lora_config(self) -> Any:
        from peft import LoraConfig

        self._existing("adapter_config.json")
        return LoraConfig.from_pretrained(str(self.folder))

    def _weight_files(self) -> list[Path]:
        index = self.folder / f"{WEIGHTS_NAME}.index.json"
        if not index.exists():
            return [self._existing(WEIGHTS_NAME)]
        return [self._existing(name) for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]

    def _existing(self, name: str) -> Path:
        file = self.folder / name
        if not file.exists():
            raise ValueError(f"{self.folder} lacks {name}, which {INDEX_NAME} promises; save or download it again.")
        return file


def _config_of(parts: Mapping[str, torch.nn.Module]) -> VSAConfig:
    configs = [enabled_config(part) for part in parts.values()]
    if not isinstance(configs[0], VSAConfig) or any(config != configs[0] for config in configs):
        raise ValueError(
            "VSA was enabled with the pattern form, or differently for each transformer, which one VSAConfig cannot "
            "say; pass config=VSAConfig(...)."
        )
    return configs[0]


def _local(path_or_repo: str | os.PathLike[str]) -> Path:
    path = Path(path_or_repo)
    if path.exists():
        return path
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(str(path_or_repo), allow_patterns=["*.json", "*.safetensors"]))


def _read_index(path: Path) -> dict[str, Any]:
    if not (path / INDEX_NAME).exists() or not (path / CONFIG_NAME).exists():
        raise ValueError(
            f"path_or_repo={str(path)!r} lacks {INDEX_NAME} or {CONFIG_NAME}, so save_vsa did not write it; "
            "load_gates reads other checkpoints with gates."
        )
    index = json.loads((path / INDEX_NAME).read_text())
    if index["format"] != _FORMAT:
        raise ValueError(f"{path / INDEX_NAME} has format {index['format']}, but this version reads {_FORMAT}.")
    return index


def _is_gate(key: str) -> bool:
    return f".{GATE}." in key


def _without_gates(transformer: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in transformer.state_dict().items() if not _is_gate(key)}


def _ready(tensors: Tensors, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """Contiguous, detached, on the CPU, floating-point ones in `dtype`."""
    ready = {}
    for key, tensor in tensors.items():
        tensor = tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None).contiguous()
        # Gathered from several processes, some are slices of a padded buffer.
        ready[key] = tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor
    return ready


def _kind(transformer: torch.nn.Module) -> str:
    """Name of the transformer's class, or of the one that FSDP derived it from."""
    return next(cls.__name__ for cls in type(transformer).__mro__ if not cls.__module__.startswith("torch.distributed"))


def _shapes(files: list[Path]) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 (safe_open is not a dict)
                shapes[key] = tuple(tensors.get_slice(key).get_shape())
    return shapes


def _compare(folder: Path, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> None:
    problems = {
        "missing keys": sorted(expected.keys() - found.keys()),
        "unexpected keys": sorted(found.keys() - expected.keys()),
        "other sizes": [
            f"{key}: {found[key]}, needs {shape}" for key, shape in expected.items() if found.get(key, shape) != shape
        ],
    }
    told = [f"{len(keys)} {what}: {keys[:3]}" for what, keys in problems.items() if keys]
    if told:
        raise ValueError(f"{folder} does not fit the transformer: {'; '.join(told)}.")


def _skeleton(transformer: torch.nn.Module) -> torch.nn.Module:
    """A copy whose parameters have sizes but no values."""
    memo = {
        id(parameter): torch.nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
        for parameter in transformer.parameters()
    }
    return copy.deepcopy(transformer, memo)


def _add_lora(transformer: torch.nn.Module, config: Any) -> None:
    if hasattr(transformer, "add_adapter"):
        transformer.add_adapter(config, adapter_name=ADAPTER)
    else:
        from peft import inject_adapter_in_model

        inject_adapter_in_model(config, transformer, ADAPTER)


def _set_lora(transformer: torch.nn.Module, tensors: Tensors) -> None:
    from peft import set_peft_model_state_dict

    weights = {key.removeprefix(LORA_PREFIX): tensor for key, tensor in tensors.items()}
    set_peft_model_state_dict(transformer, weights, adapter_name=ADAPTER)
