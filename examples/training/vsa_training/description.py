"""`dataset.json`: what a folder of shards was made with."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vsa_diffusers.files import read_json, replaced_file

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
        source: what else decides the shards' content, such as digests of the pipeline's models.
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
    source: dict[str, Any] = field(default_factory=dict)
    format: int = _FORMAT

    def save(self, folder: Path) -> None:
        """Write `dataset.json`."""
        with replaced_file(folder / DATASET_NAME) as partial:
            partial.write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Description:
        """Read `dataset.json`.

        Raises:
            ValueError: there is none, or it is not one of this version.
        """
        path = folder / DATASET_NAME
        if not path.exists():
            raise ValueError(f"{folder} has no {DATASET_NAME}; make the shards with precompute_latents.py.")
        values = read_json(path)
        if values.get("format") != _FORMAT:
            raise ValueError(f"{path} has format {values.get('format')!r}, not {_FORMAT}; make it anew.")
        wrong = [name for name, kind in _KINDS.items() if type(values.get(name)) not in kind]
        unknown = sorted(values.keys() - cls.__dataclass_fields__.keys())
        if wrong or unknown:
            raise ValueError(f"{path} has {', '.join(wrong + unknown)} missing, mistyped or unknown; make it anew.")
        return cls(**values)

    @classmethod
    def check_same(cls, folder: Path, facts: dict[str, Any]) -> None:
        """Whether shards that are made with these facts, fields and parts of `source`, may go into the folder.

        Raises:
            ValueError: it has shards that were made otherwise.
        """
        if not (folder / DATASET_NAME).exists():
            if any(folder.glob("*.safetensors")):
                raise ValueError(f"{folder} has shards but no {DATASET_NAME}; choose another output_dir.")
            return
        description = cls.load(folder)
        there = asdict(description) | description.source
        wanted = json.loads(json.dumps(facts))
        changed = [
            f"{name}={there.get(name)} (now {value})"
            for name, value in sorted(wanted.items())
            if there.get(name) != value
        ]
        if changed:
            raise ValueError(
                f"{folder} holds shards made with {', '.join(changed)}; go on with those, or choose another output_dir."
            )


# Types of the fields that `dataset.json` must have.
_KINDS: dict[str, tuple[type, ...]] = {
    "pipeline": (str,), "transformer": (str,), "channel_axis": (int,), "shift": (int, float), "height": (int,),
    "width": (int,), "num_frames": (int,), "fps": (int, float), "call": (dict,),
}  # fmt: skip
