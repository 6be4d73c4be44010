"""`save_vsa` and `load_vsa`: what training changed, as a directory that brings it back on a stock pipeline.

vsa_config.json                                  the VSAConfig
vsa_index.json                                   which components there are, what is saved of each, and all other files
<component>/vsa_gates.safetensors                gates, if there are some
<component>/diffusion_pytorch_model.safetensors  all other weights, perhaps in shards ("full")
<component>/pytorch_lora_weights.safetensors     or a LoRA, and its adapter_config.json ("lora")
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from . import lora
from .attention import check_choice
from .config import CONFIG_NAME, INDEX_NAME, VSAConfig, make_config, module_configs
from .directories import SavedDirectory, read_directory, replaced_directory
from .extras import check_installed
from .files import check_fits, check_name, check_values, local_directory, opened_tensors
from .gate_state import is_plain
from .gates import GATES_NAME, Gates, fitting_gates, is_gate, set_gates, weight_map
from .models import attention_modules, require_family
from .pipeline import PipelineOrTransformer, enable_vsa, enabled_config, supported_parts, vsa_unchanged_on_error
from .published import ROUNDINGS, SMALL, plan_published
from .trained import SOURCE
from .undo import unchanged_on_error

logger = logging.getLogger(__name__)

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
CONTENTS = ("full", "lora", "gates")
FORMAT = 1
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

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

    What an earlier `save_vsa` wrote into the directory is replaced as a whole: after an error, a kill or with the disk
    full, `load_vsa` finds either the old or the new. Both need room until then.

    Args:
        pipe: a pipeline (every video transformer in it), or a transformer.
        directory: is created if need be; files of these names in it are replaced, all others stay.
        contents: `"full"`: all weights. `"lora"`: those of the peft adapter. `"gates"`: the gates alone. `"auto"`:
            "lora" where there is an adapter, else "full". Gates are saved always.
        config: saved with them; `None` takes the one that VSA was enabled with.
        dtype: floating-point tensors are saved in this, of 16 bits or more; `None` keeps theirs.
        state_dict: a transformer's whole state dict, where its own is spread over several processes.
        max_shard_size: of the files with all weights, as in `save_pretrained`.

    Returns:
        The directory.

    Raises:
        ValueError: there is nothing of that kind to save; weights are not finite, do not fit into `dtype`, or are not
            here as numbers (offloaded, quantised or spread over processes); VSA is not enabled and no config was given,
            or it was enabled with the pattern form.
    """
    parts = supported_parts(pipe)
    if state_dict is not None and len(parts) > 1:
        raise ValueError(f"state_dict= is one transformer's, but pipe has {', '.join(parts)}; pass one transformer.")
    check_choice("contents", contents, ("auto", *CONTENTS))
    if dtype is not None and dtype not in _DTYPES:
        raise ValueError(f"dtype={dtype} cannot hold weights; use torch.bfloat16, float16, float32 or float64.")
    config = config or _config_of(parts)
    saves = [
        _Save.make(name, part, part.state_dict() if state_dict is None else state_dict, contents)
        for name, part in parts.items()
    ]
    for save in saves:
        save.check(dtype)
    facts = {"format": FORMAT, "components": {save.name: save.description() for save in saves}}
    with replaced_directory(directory, INDEX_NAME, facts, _owned) as folder:
        for save in saves:
            save.write(folder / save.name, dtype, max_shard_size)
        config.save_pretrained(folder)
    return Path(directory)


def load_vsa(
    pipe: PipelineOrTransformer,
    path_or_repo: str | os.PathLike[str],
    *,
    rounding: str = "tiles",
    variant: str | None = None,
    **changes: Any,
) -> PipelineOrTransformer:
    """Bring what `save_vsa` wrote back on a stock pipeline or transformer, and enable VSA as it was trained.

        pipe = WanPipeline.from_pretrained(...)
        load_vsa(pipe, "my_training/final")
        load_vsa(pipe, "FastVideo/FastWan2.1-T2V-1.3B-Diffusers")

    Checkpoints as they were published are taken, too: FastVideo's of Wan and MiniMax-H3 (FastH3), FastH3's LoRA files,
    which are merged into the weights, and LTX-2's gates. On a transformer that came from the same checkpoint, gates are
    all that is loaded. What is set then is logged; `docs/checkpoints.md` has a table.

    Load before offloading, compiling or quantising. A LoRA becomes the adapter "vsa".
    While weights are replaced, main memory holds a copy of the old ones.

    Args:
        pipe: a pipeline with the video transformers that were saved, or the transformer if there was one.
        path_or_repo: a directory, a safetensors file, or a repository on the Hugging Face Hub, of which only the files
            that are needed are downloaded.
        rounding: how a published checkpoint's sparsity becomes a number of tiles: `"tiles"`, by their number; or
            `"tokens"`, as FastVideo did before July 2026, which keeps a few less where tiles do not divide the video
            evenly and needs `video_shape=`.
        variant: folder of one of several adapters, such as "vsa-datafree".
        changes: fields of `VSAConfig` to override, such as `top_k_ratio=0.3`.

    Returns:
        `pipe` itself.

    Raises:
        ValueError: not such a directory or checkpoint; one of a kind that cannot be served, with the reason; damaged or
            edited files; other components or another class than were saved; missing or unexpected keys, sizes or values
            that do not fit, or a config that does not. After any error weights, gates, adapters and VSA are what they
            were.
    """
    check_choice("rounding", rounding, ROUNDINGS)
    published = None
    path = local_directory(path_or_repo, list(SMALL))
    if (path / INDEX_NAME).exists():
        path = local_directory(path_or_repo, ["*.json", "*.safetensors"])
        config, loads = read_directory(path, INDEX_NAME, lambda saved: _plan(pipe, saved, changes))
    else:
        published = plan_published(pipe, path_or_repo, changes, rounding, variant)
        config, loads = published.config, [_Load(published.transformer, published.weights, published.gates)]
    transformers = [load.transformer for load in loads]
    with unchanged_on_error(*transformers, beside=pipe) as keep, vsa_unchanged_on_error(transformers):
        for load in loads:
            load.extend(keep)
        if published is not None:
            setattr(published.transformer, SOURCE, str(path_or_repo))
        enable_vsa(pipe, config=config)
        for load in loads:
            load.replace(keep)
    if published is not None:
        logger.info("%s.", published.said)
    return pipe


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
        gates = {key: tensor for key, tensor in state_dict.items() if is_gate(key)}
        if contents == "gates" and not gates:
            raise ValueError(f'contents="gates", but {kind} has none; add_gate_compress(transformer) adds new ones.')
        weights, adapter = {}, None
        if contents == "full":
            weights = {key: tensor for key, tensor in state_dict.items() if not is_gate(key)}
        if contents == "lora":
            from peft import get_peft_model_state_dict

            [(adapter_name, adapter)] = adapters.items()
            weights = get_peft_model_state_dict(transformer, dict(state_dict), adapter_name=adapter_name)
            weights = {lora.LORA_PREFIX + key: tensor for key, tensor in weights.items()}
        return cls(name, transformer, contents, gates, weights, adapter)

    def check(self, dtype: torch.dtype | None) -> None:
        """Raise `ValueError` unless all of it can be written, and read again."""
        kind = _kind(self.transformer)
        parameters = {key for key, _ in self.transformer.named_parameters()}
        for key, tensor in {**self.gates, **self.weights}.items():
            if tensor.dtype.is_floating_point:
                if not is_plain(tensor):
                    raise ValueError(
                        f"{key} of {kind} is a {type(tensor).__name__} on {tensor.device}, whose values are not here "
                        "as numbers; save before offloading or quantising, or pass a gathered state_dict=."
                    )
                check_values(key, tensor, kind, dtype)
            elif key in parameters or self.contents == "lora" or tensor.is_meta:
                check_values(key, tensor, kind)
        if self.contents == "lora":
            shapes = {key: tuple(tensor.shape) for key, tensor in self.weights.items()}
            lora.lora_config(self.adapter.to_dict(), lora.lora_ranks(shapes, kind), f"the adapter of {kind}")

    def description(self) -> dict[str, Any]:
        return {"class": _kind(self.transformer), "contents": self.contents, "gates": bool(self.gates)}

    def write(self, folder: Path, dtype: torch.dtype | None, max_shard_size: str) -> None:
        folder.mkdir()
        if self.gates:
            save_file(_ready(self.gates, dtype), folder / GATES_NAME, metadata={"format": "pt"})
        if self.contents == "lora":
            save_file(_ready(self.weights, dtype), folder / lora.LORA_NAME, metadata={"format": "pt"})
            self.adapter.save_pretrained(folder)
        if self.contents == "full":
            from huggingface_hub import save_torch_state_dict

            stem, suffix = WEIGHTS_NAME.split(".")
            pattern = f"{stem}{{suffix}}.{suffix}"
            weights = _ready(self.weights, dtype)
            save_torch_state_dict(weights, folder, filename_pattern=pattern, max_shard_size=max_shard_size)


def _plan(pipe: Any, saved: SavedDirectory, changes: Mapping[str, Any]) -> tuple[VSAConfig, list[_Load]]:
    """Everything that loading will do, from files that fit; nothing is changed."""
    components = saved_components(saved)
    if not saved.has(CONFIG_NAME):
        raise ValueError(f"{saved.path} lacks {CONFIG_NAME}, so save_vsa did not write it; save or download it again.")
    config = make_config(VSAConfig.from_file(saved.file(CONFIG_NAME)), changes)
    parts = supported_parts(pipe)
    if isinstance(pipe, torch.nn.Module) and len(components) == 1:
        parts = dict(zip(components, parts.values(), strict=True))
    if parts.keys() != components.keys():
        raise ValueError(
            f"{str(saved.path)!r} holds {', '.join(components)}, but pipe has {', '.join(parts)}; pass the pipeline "
            "that it was trained for, or one transformer if only one was saved."
        )
    for part in parts.values():
        modules = require_family(part).video_modules(part)
        module_configs(config, list(modules), [name for name in attention_modules(part) if name not in modules])
    return config, [_Load.make(part, saved, name, components[name]) for name, part in parts.items()]


def saved_components(saved: SavedDirectory) -> dict[str, dict[str, Any]]:
    """What the index says of each component, if it is an index."""
    if saved.facts.get("format") != FORMAT:
        raise ValueError(
            f"{saved.manifest} has format {saved.facts.get('format')!r}, but this version reads {FORMAT}; save it "
            "again, or install the version that wrote it."
        )
    components = saved.facts.get("components")
    known = {"class": str, "contents": str, "gates": bool}
    if (
        not isinstance(components, dict)
        or not components
        or not all(isinstance(each, dict) for each in components.values())
        or not all(isinstance(each.get(key), kind) for each in components.values() for key, kind in known.items())
    ):
        raise ValueError(
            f'{saved.manifest} has no "components" with class, contents and gates; save or download it again.'
        )
    for name, each in components.items():
        check_name(name, saved.manifest)
        if each["contents"] not in CONTENTS:
            raise ValueError(
                f"{saved.manifest} has contents {each['contents']!r} for {name}, but there are {', '.join(CONTENTS)}; "
                "save it again, or install the version that wrote it."
            )
    return components


@dataclass
class _Load:
    """What will be loaded into one transformer."""

    transformer: torch.nn.Module
    weights: Tensors
    gates: Gates
    lora_config: Any = None
    lora_weights: Tensors | None = None

    @classmethod
    def make(cls, transformer: torch.nn.Module, saved: SavedDirectory, name: str, facts: Mapping[str, Any]) -> _Load:
        """Raise `ValueError` unless everything in the folder fits the transformer."""
        kind = _kind(transformer)
        folder = saved.path / name
        if kind != facts["class"]:
            raise ValueError(f"{folder} was saved from {facts['class']}, but pipe has {kind}; load it on that class.")
        if any(parameter.is_meta for parameter in transformer.parameters()):
            raise ValueError(f"{kind} has parameters without values, as offloading leaves them; load_vsa comes before.")
        load = cls(transformer, {}, {})
        if facts["contents"] == "full":
            if adapters := getattr(transformer, "peft_config", {}):
                raise ValueError(
                    f"{folder} holds all weights, but {kind} has the adapter {list(adapters)}; remove it with "
                    "unload_lora()."
                )
            targets = _without_gates(transformer)
            load.weights = _fitting(folder, targets, weight_files(saved, name))
        if facts["contents"] == "lora":
            load._plan_lora(saved, name, folder)
        if facts["gates"]:
            load.gates = fitting_gates(transformer, saved.file(f"{name}/{GATES_NAME}"))
        return load

    def extend(self, keep: Callable[[Iterable[torch.Tensor]], None]) -> None:
        """Add what the transformer lacks: adapter and gates, with their values."""
        if self.lora_weights is not None:
            lora.add_lora(self.transformer, self.lora_config)
            lora.set_lora(self.transformer, self.lora_weights)
        if self.gates:
            set_gates(self.transformer, self.gates, keep)

    def replace(self, keep: Callable[[Iterable[torch.Tensor]], None]) -> None:
        """Give the transformer its weights."""
        if self.weights:
            keep(tensor for key, tensor in _without_gates(self.transformer).items() if key in self.weights)
            self.transformer.load_state_dict(self.weights, strict=False)

    def _plan_lora(self, saved: SavedDirectory, name: str, folder: Path) -> None:
        if lora.ADAPTER in getattr(self.transformer, "peft_config", {}):
            raise ValueError(
                f'{type(self.transformer).__name__} already has an adapter "{lora.ADAPTER}"; remove it with '
                f'delete_adapters("{lora.ADAPTER}") before loading another.'
            )
        check_installed("peft", extra="train")
        from peft import get_peft_model_state_dict

        file = saved.file(f"{name}/{lora.LORA_NAME}")
        with opened_tensors(file) as tensors:
            shapes = {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118
        ranks = lora.lora_ranks(shapes, str(file))
        modules = dict(self.transformer.named_modules())
        unknown = [key for key in ranks if key not in modules]
        if unknown:
            raise ValueError(f"{folder} does not fit the transformer: it adapts {unknown[:3]}, which it lacks.")
        self.lora_config = lora.read_lora_config(saved.file(f"{name}/{lora.CONFIG_NAME}"), ranks)
        skeleton = _skeleton(self.transformer)
        lora.add_lora(skeleton, self.lora_config)
        state = get_peft_model_state_dict(skeleton, adapter_name=lora.ADAPTER)
        targets = {lora.LORA_PREFIX + key: tensor for key, tensor in state.items()}
        self.lora_weights = _fitting(folder, targets, [file])


def _fitting(folder: Path, targets: Tensors, files: list[Path]) -> dict[str, torch.Tensor]:
    """The tensors in the files, which have the targets' names, sizes and kinds."""
    tensors: dict[str, torch.Tensor] = {}
    source: dict[str, Path] = {}
    for file in files:
        with opened_tensors(file) as opened:
            for key in opened.keys():  # noqa: SIM118 (safe_open is not a dict)
                if key in tensors:
                    raise ValueError(f"{file} holds {key}, as {source[key]} does; save or download it again.")
                tensors[key], source[key] = opened.get_tensor(key), file
    check_fits(folder, *({key: tuple(each.shape) for key, each in some.items()} for some in (targets, tensors)))
    for key, tensor in tensors.items():
        target = targets[key]
        if not target.dtype.is_floating_point and tensor.dtype == target.dtype:
            continue
        if type(target) not in (torch.Tensor, torch.nn.Parameter) or not target.dtype.is_floating_point:
            raise ValueError(
                f"{key} is {tensor.dtype} in {source[key]}, but a {type(target).__name__} of {target.dtype} in the "
                "transformer; load it before quantising."
            )
        check_values(key, tensor, str(source[key]), target.dtype)
    return tensors


def weight_files(saved: SavedDirectory, name: str) -> list[Path]:
    index = f"{name}/{WEIGHTS_NAME}.index.json"
    if not saved.has(index):
        return [saved.file(f"{name}/{WEIGHTS_NAME}")]
    return [saved.file(f"{name}/{shard}") for shard in sorted(set(weight_map(saved.file(index)).values()))]


def _owned(old: SavedDirectory) -> list[str]:
    """What `save_vsa` wrote while its index did not name the files."""
    owned = [CONFIG_NAME]
    for name, each in saved_components(old).items():
        files = [GATES_NAME] if each["gates"] else []
        if each["contents"] == "lora":
            files += [lora.LORA_NAME, lora.CONFIG_NAME]
        if each["contents"] == "full":
            files += [WEIGHTS_NAME, f"{WEIGHTS_NAME}.index.json"]
            owned += [file.relative_to(old.path).as_posix() for file in weight_files(old, name)]
        owned += [f"{name}/{file}" for file in files]
    return owned


def _config_of(parts: Mapping[str, torch.nn.Module]) -> VSAConfig:
    configs = [enabled_config(part) for part in parts.values()]
    if not isinstance(configs[0], VSAConfig) or any(config != configs[0] for config in configs):
        raise ValueError(
            "VSA was enabled with the pattern form, or differently for each transformer, which one VSAConfig cannot "
            "say; pass config=VSAConfig(...)."
        )
    return configs[0]


def _without_gates(transformer: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in transformer.state_dict().items() if not is_gate(key)}


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


def _skeleton(transformer: torch.nn.Module) -> torch.nn.Module:
    """A copy whose parameters have sizes but no values."""
    memo = {
        id(parameter): torch.nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
        for parameter in transformer.parameters()
    }
    return copy.deepcopy(transformer, memo)
