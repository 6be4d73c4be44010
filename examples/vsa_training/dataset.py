"""Shards of encoded clips: what `precompute_latents.py` writes, and the order in which `train_vsa.py` reads it."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

DATASET_NAME = "dataset.json"
_FORMAT = 1


@dataclass(frozen=True)
class Description:
    """What the shards were made with: `dataset.json`.

    Args:
        pipeline, transformer: class names in diffusers.
        channel_axis: of the noisy latents in the transformer's `hidden_states`.
        shift: of the noise levels, as the pipeline's scheduler has it for this size.
        height, width, num_frames: of the clips, in pixels and frames.
        fps: frames per second.
        call: further arguments of the pipeline's call.
        format: of the files.
    """

    pipeline: str
    transformer: str
    channel_axis: int
    shift: float
    height: int
    width: int
    num_frames: int
    fps: float
    call: dict[str, Any] = field(default_factory=dict)
    format: int = _FORMAT

    def save(self, folder: Path) -> None:
        """Write `dataset.json`."""
        (folder / DATASET_NAME).write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Description:
        """Read `dataset.json`.

        Raises:
            ValueError: there is none, or it is of another version.
        """
        if not (folder / DATASET_NAME).exists():
            raise ValueError(f"{folder} has no {DATASET_NAME}; make the shards with precompute_latents.py.")
        values = json.loads((folder / DATASET_NAME).read_text())
        if values.get("format") != _FORMAT:
            raise ValueError(f"{folder / DATASET_NAME} has format {values.get('format')}, not {_FORMAT}; make it anew.")
        return cls(**values)


@dataclass
class Sample:
    """One clip, or, after `collate`, several: clean latents and all that the transformer gets besides noise.

    Args:
        clean: latents in the transformer's layout.
        timestep_scale: the transformer's timestep divided by the scheduler's.
        extra_channels: to be appended to the noisy latents, or `None`.
        conditions: further arguments of the transformer.
        caption: for people.
    """

    clean: torch.Tensor
    timestep_scale: torch.Tensor
    extra_channels: torch.Tensor | None
    conditions: dict[str, Any]
    caption: Any = ""

    def with_extra_channels(self, latents: torch.Tensor, axis: int) -> torch.Tensor:
        """What the transformer takes: these latents, and behind them the extra channels, if there are some."""
        if self.extra_channels is None:
            return latents
        return torch.cat([latents, self.extra_channels.to(latents)], axis)

    def to(self, device: torch.device) -> Sample:
        """All tensors on `device`."""
        tensors: dict[str, torch.Tensor] = {}
        tree = _take_apart(self, tensors)
        return _put_together(tree, {name: tensor.to(device) for name, tensor in tensors.items()}, self.caption)


def write_shard(path: Path, samples: list[Sample]) -> None:
    """Write samples as one safetensors file; a kill leaves the whole file or none."""
    stored, trees = {}, []
    for index, sample in enumerate(samples):
        tensors: dict[str, torch.Tensor] = {}
        tree = _take_apart(sample, tensors)
        trees.append({"tree": tree, "kind": _kind(tree, tensors), "caption": sample.caption})
        stored |= {f"{index}/{name}": tensor.cpu().contiguous() for name, tensor in tensors.items()}
    partial = path.with_suffix(".partial")
    save_file(stored, partial, metadata={"samples": json.dumps(trees)})
    partial.replace(path)


class Shards:
    """Samples of a folder's shards, read when they are asked for.

    Args:
        files: the shards; see `split_shards`.
    """

    def __init__(self, files: list[Path]):
        self._entries: list[tuple[Path, int, dict[str, Any]]] = []
        for file in files:
            with safe_open(file, framework="pt") as shard:
                samples = json.loads(shard.metadata()["samples"])
            self._entries += [(file, index, entry) for index, entry in enumerate(samples)]

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> Sample:
        file, place, entry = self._entries[index]
        with safe_open(file, framework="pt") as shard:
            tensors = {name: shard.get_tensor(f"{place}/{name}") for name in _names(entry["tree"])}
        return _put_together(entry["tree"], tensors, entry["caption"])

    def kinds(self) -> dict[str, list[int]]:
        """Indices of samples that can be in one batch: of equal sizes and equal constants."""
        kinds = defaultdict(list)
        for index, (_, _, entry) in enumerate(self._entries):
            kinds[entry["kind"]].append(index)
        return dict(kinds)


def split_shards(folder: Path, validation_shards: int) -> tuple[list[Path], list[Path]]:
    """A folder's shards to train on, and the last ones, held out.

    Raises:
        ValueError: there are too few.
    """
    files = sorted(folder.glob("*.safetensors"))
    if len(files) <= validation_shards:
        raise ValueError(
            f"{folder} has {len(files)} shards, and validation_shards={validation_shards} leaves none to train on; "
            "precompute more, or with fewer clips in each (--samples_per_shard)."
        )
    cut = len(files) - validation_shards
    return files[:cut], files[cut:]


def collate(samples: list[Sample]) -> Sample:
    """One batch. Tensors with a first axis of 1 are concatenated; others are the same in all samples."""
    parts: list[dict[str, torch.Tensor]] = []
    for sample in samples:
        parts.append({})
        tree = _take_apart(sample, parts[-1])
    joined = {
        name: torch.cat([part[name] for part in parts]) if _is_batched(tensor) else tensor
        for name, tensor in parts[0].items()
    }
    return _put_together(tree, joined, [sample.caption for sample in samples])


class BatchOrder:
    """Which samples are in each batch of one process, for any number of steps: a function of the seed alone.

    Every epoch is shuffled anew and cut into batches of one kind; a kind's last batch is filled up from its first.
    Iterating yields lists of indices, from `first_batch` on.

    Args:
        kinds: see `Shards.kinds`.
        batch_size: samples per batch.
        seed: of the order.
        process, processes: this process takes every `processes`-th batch.
        first_batch: batches of this process that a training which goes on has had.
        batches: number of batches in all, the first ones included.
    """

    def __init__(
        self,
        kinds: dict[str, list[int]],
        batch_size: int,
        seed: int,
        process: int,
        processes: int,
        first_batch: int,
        batches: int,
    ):
        self.kinds, self.batch_size, self.seed = kinds, batch_size, seed
        self.process, self.processes = process, processes
        self.first_batch, self.batches = first_batch, batches

    def __len__(self) -> int:
        return self.batches - self.first_batch

    def __iter__(self) -> Iterator[list[int]]:
        wanted = range(self.first_batch * self.processes + self.process, self.batches * self.processes, self.processes)
        per_epoch = sum(-(-len(indices) // self.batch_size) for indices in self.kinds.values())
        epoch, batches = -1, []
        for place in wanted:
            if place // per_epoch != epoch:
                epoch = place // per_epoch
                batches = self._epoch(epoch)
            yield batches[place % per_epoch]

    def _epoch(self, epoch: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + epoch)
        batches = []
        for kind in sorted(self.kinds):
            indices = self.kinds[kind]
            order = [indices[place] for place in torch.randperm(len(indices), generator=generator).tolist()]
            count = -(-len(order) // self.batch_size)
            order = (order * self.batch_size)[: count * self.batch_size]
            batches += [order[first : first + self.batch_size] for first in range(0, len(order), self.batch_size)]
        return [batches[place] for place in torch.randperm(len(batches), generator=generator).tolist()]


def _take_apart(sample: Sample, tensors: dict[str, torch.Tensor]) -> Any:
    """A JSON tree of the sample's fields; its tensors go to `tensors`, by the path that leads to them."""
    fields = {name: getattr(sample, name) for name in ("clean", "timestep_scale", "extra_channels", "conditions")}
    return _to_tree(fields, "sample", tensors)


def _put_together(tree: Any, tensors: dict[str, torch.Tensor], caption: Any) -> Sample:
    return Sample(**_from_tree(tree, tensors), caption=caption)


def _to_tree(value: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        tensors[path] = value
        return {"tensor": path}
    if isinstance(value, dict):
        return {"dict": {key: _to_tree(item, f"{path}.{key}", tensors) for key, item in value.items()}}
    if isinstance(value, (list, tuple)):
        return {"list": [_to_tree(item, f"{path}.{place}", tensors) for place, item in enumerate(value)]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    raise TypeError(f"{path} is a {type(value).__name__}, which a shard cannot hold; tensors and plain values can be.")


def _from_tree(tree: Any, tensors: dict[str, torch.Tensor]) -> Any:
    [(kind, content)] = tree.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _from_tree(item, tensors) for key, item in content.items()}
    return [_from_tree(item, tensors) for item in content] if kind == "list" else content


def _names(tree: Any) -> Iterator[str]:
    [(kind, content)] = tree.items()
    if kind == "tensor":
        yield content
    elif kind != "value":
        for item in content.values() if kind == "dict" else content:
            yield from _names(item)


def _is_batched(tensor: torch.Tensor) -> bool:
    return tensor.ndim > 0 and tensor.shape[0] == 1


def _kind(tree: Any, tensors: dict[str, torch.Tensor]) -> str:
    """Equal for samples that can be in one batch."""
    digest = hashlib.sha256(json.dumps(tree, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        if not _is_batched(tensor):
            digest.update(tensor.detach().cpu().double().numpy().tobytes())
    return digest.hexdigest()[:16]
