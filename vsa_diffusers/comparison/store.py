"""Videos that were made already, kept without loss so that a later comparison can go on from them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file

from ..files import PathLike, read_json, read_tensors, replaced_file
from ..generation.calling import Video
from ..pipeline import supported_parts
from ..video_files import read_frames, write_lossless
from .measure import Measurement

_NUMBERS = ("seconds", "denoising", "peak_memory")


class Store:
    """Measurements in a folder, each under the digest of all that it depends on; `None` keeps and finds nothing."""

    def __init__(self, folder: Path | None):
        self.folder = folder

    def find(self, facts: Mapping[str, Any]) -> Measurement | None:
        """What was kept under these facts."""
        path = self._path(facts)
        if path is None or not path.exists():
            return None
        kept = read_json(path)
        audio = None
        if kept["sample_rate"] is not None:
            audio = read_tensors(path.with_suffix(".safetensors"))["audio"]
        frames = read_frames(path.with_suffix(".mkv"))
        video = Video(frames, kept["fps"], audio, kept["sample_rate"])
        return Measurement(video, **{name: kept[name] for name in _NUMBERS})

    def keep(self, facts: Mapping[str, Any], made: Measurement) -> None:
        """Keep a measurement; the file with its numbers comes last, so that it is there only if all are."""
        path = self._path(facts)
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        video = made.video
        write_lossless(path.with_suffix(".mkv"), video.frames, video.fps)
        if video.audio is not None:
            with replaced_file(path.with_suffix(".safetensors")) as partial:
                save_file({"audio": video.audio.contiguous()}, partial)
        numbers = {name: getattr(made, name) for name in _NUMBERS}
        numbers |= {"fps": video.fps, "sample_rate": None if video.audio is None else video.sample_rate}
        with replaced_file(path) as partial:
            partial.write_text(json.dumps(numbers | {"facts": facts}, indent=2, default=str) + "\n")

    def _path(self, facts: Mapping[str, Any]) -> Path | None:
        if self.folder is None:
            return None
        text = json.dumps(facts, sort_keys=True, default=str)
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:20]}.json"


class MemoryStore(Store):
    """Measurements in memory, which end with the process."""

    def __init__(self) -> None:
        super().__init__(None)
        self.kept: dict[str, Measurement] = {}

    def find(self, facts: Mapping[str, Any]) -> Measurement | None:
        """What was kept under these facts."""
        return self.kept.get(json.dumps(facts, sort_keys=True, default=str))

    def keep(self, facts: Mapping[str, Any], made: Measurement) -> None:
        """Keep a measurement."""
        self.kept[json.dumps(facts, sort_keys=True, default=str)] = made


def fingerprint(pipe: DiffusionPipeline) -> str:
    """What tells the weights of a pipeline's transformers from others: names, sizes, and the first values of each."""
    digest = hashlib.sha256()
    for name, transformer in supported_parts(pipe).items():
        parameters = dict(transformer.named_parameters())
        digest.update(repr([name, *((key, tuple(value.shape)) for key, value in parameters.items())]).encode())
        here = [value.detach().flatten()[:4].double() for value in parameters.values() if not value.is_meta]
        if here:
            digest.update(torch.cat([value.cpu() for value in here]).numpy().tobytes())
    return digest.hexdigest()[:20]


def scheduler_of(pipe: DiffusionPipeline) -> dict[str, Any]:
    """What tells the noise schedule and solver of a pipeline from others, ready for JSON."""
    scheduler = getattr(pipe, "scheduler", None)
    config = {name: value for name, value in getattr(scheduler, "config", {}).items() if not name.startswith("_")}
    return json.loads(json.dumps({"class": type(scheduler).__name__} | config, sort_keys=True, default=str))


def told(call: Mapping[str, Any]) -> dict[str, Any]:
    """A call's arguments with digests in place of images and arrays, whose text says where they are, not what."""
    return {name: _told(value) for name, value in call.items()}


def _told(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_told(each) for each in value]
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().double().numpy()
    if not hasattr(value, "tobytes"):
        return value
    form = [getattr(value, name, None) for name in ("mode", "size", "shape")]
    return hashlib.sha256(repr(form).encode() + value.tobytes()).hexdigest()[:20]


def folder_of(directory: PathLike) -> Path:
    """Where a comparison keeps its videos."""
    return Path(directory) / "frames"
