"""Shards of encoded clips: what `precompute_latents.py` writes, and the order in which `train_vsa.py` reads it."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from vsa_diffusers.files import opened_tensors, replaced_file


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

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> Sample:
        """All tensors on `device`, floating-point ones in `dtype` if it is given."""
        tensors: dict[str, torch.Tensor] = {}
        tree = _take_apart(self, tensors)
        moved = {
            name: tensor.to(device, dtype if tensor.is_floating_point() else None) for name, tensor in tensors.items()
        }
        return _put_together(tree, moved, self.caption)


def write_shard(path: Path, samples: list[Sample], clips: list[str] | None = None) -> None:
    """Write samples as one safetensors file; a kill leaves the whole file or none.

    Args:
        path: the file.
        samples: its content.
        clips: names of the clips that they were made from.
    """
    stored, trees = {}, []
    for index, sample in enumerate(samples):
        tensors: dict[str, torch.Tensor] = {}
        tree = _take_apart(sample, tensors)
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        entry = {"tree": tree, "kind": _kind(tree, tensors), "caption": sample.caption, "checksum": _checksum(tensors)}
        trees.append(entry)
        stored |= {f"{index}/{name}": tensor for name, tensor in tensors.items()}
    with replaced_file(path) as partial:
        save_file(stored, partial, metadata={"samples": json.dumps(trees), "clips": json.dumps(clips)})


def check_shard(path: Path, clips: list[str], captions: list[str]) -> None:
    """Whether a shard that is there is the one that would be written now.

    Raises:
        ValueError: it is damaged, or of other clips.
    """
    header = _Header.read(path)
    if header.clips == clips and [entry["caption"] for entry in header.samples] != captions:
        raise ValueError(
            f"{path} holds other captions of its clips than data_dir has now; remove it to make it anew, or choose "
            "another output_dir."
        )
    if header.clips != clips:
        raise ValueError(
            f"{path} holds {header.clips}, where {clips} of data_dir are due now; remove it to "
            "make it anew, or choose another output_dir."
        )


@dataclass(frozen=True)
class _Header:
    """What a shard says of its content: the samples, the clips they are of, and the size of each one's latents."""

    samples: list[dict[str, Any]]
    clips: list[str] | None
    sizes: list[tuple[int, ...]]

    @classmethod
    def read(cls, path: Path) -> _Header:
        """Raise `ValueError`, which names the shard, if it is damaged or none."""
        mend = "remove it, and run precompute_latents.py again to make it anew"
        try:
            with opened_tensors(path) as shard:
                names, metadata = set(shard.keys()), shard.metadata() or {}
                samples, clips = (json.loads(metadata.get(name, "null")) for name in ("samples", "clips"))
                promised = {f"{place}/{name}" for place, entry in enumerate(samples) for name in _names(entry["tree"])}
                sizes = [tuple(shard.get_slice(f"{place}/sample.clean").get_shape()) for place in range(len(samples))]
                complete = promised == names and all({"kind", "caption"} <= entry.keys() for entry in samples)
        except (ValueError, TypeError, KeyError, AttributeError, SafetensorError) as error:
            raise ValueError(f"{path} is damaged or no shard ({error}); {mend}.") from error
        if not complete or not samples:
            raise ValueError(f"{path} lacks tensors of its samples; {mend}.")
        return cls(samples, clips, sizes)


class Shards:
    """Samples of a folder's shards, read when they are asked for.

    Args:
        files: the shards; see `split_shards`.

    Raises:
        ValueError: one is damaged, or holds latents of another size than the first one.
    """

    def __init__(self, files: list[Path]):
        self._entries: list[tuple[Path, int, dict[str, Any]]] = []
        self.size: tuple[int, ...] | None = None
        for file in files:
            header = _Header.read(file)
            for size in header.sizes:
                self.size = self.size or size
                if size != self.size:
                    raise ValueError(
                        f"{file} holds latents of {size}, but {files[0]} of {self.size}; they were made for other "
                        "sizes, so make one of them anew with precompute_latents.py."
                    )
            self._entries += [(file, index, entry) for index, entry in enumerate(header.samples)]

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> Sample:
        file, place, entry = self._entries[index]
        with opened_tensors(file) as shard:
            tensors = {name: shard.get_tensor(f"{place}/{name}") for name in _names(entry["tree"])}
        # Shards of earlier versions have no checksums.
        if entry.get("checksum", _checksum(tensors)) != _checksum(tensors):
            raise ValueError(
                f"{file} is damaged: sample {place} is not what was written; remove it, and run precompute_latents.py "
                "again to make it anew."
            )
        return _put_together(entry["tree"], tensors, entry["caption"])

    def digest(self) -> str:
        """Equal for the same samples in the same order, as far as their sizes, captions and checksums tell."""
        digest = hashlib.sha256()
        for _, _, entry in self._entries:
            digest.update(json.dumps([entry["kind"], entry["caption"], entry.get("checksum")]).encode())
        return digest.hexdigest()[:16]

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


def _checksum(tensors: dict[str, torch.Tensor]) -> int:
    """CRC-32 over the tensors' names and values."""
    checksum = 0
    for name in sorted(tensors):
        # Viewed as bytes: numpy has no bfloat16.
        values = tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        checksum = zlib.crc32(values.numpy(), zlib.crc32(name.encode(), checksum))
    return checksum


def _kind(tree: Any, tensors: dict[str, torch.Tensor]) -> str:
    """Equal for samples that can be in one batch."""
    digest = hashlib.sha256(json.dumps(tree, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        if not _is_batched(tensor):
            digest.update(tensor.detach().cpu().double().numpy().tobytes())
    return digest.hexdigest()[:16]
