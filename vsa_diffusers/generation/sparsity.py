"""How sparse a video becomes: settings as text and as files, and their use on a pipeline."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..config import CONFIG_NAME, INDEX_NAME, VSAConfig, resolve_config
from ..files import PathLike, read_json
from ..pipeline import enable_vsa
from ..pretrained import load_vsa
from ..schedule import RatioSchedule

Config = VSAConfig | Mapping[str, Any]
_FIELDS = {"ratio": "top_k_ratio", **{field.name: field.name for field in fields(VSAConfig)}}
_NUMBERS = re.compile(r"-?\d+([x, ]+-?\d+)*")
_RAMP = re.compile(r"[\d.]+(:[\d.]+){1,2}")
_TUPLES = ("block_size", "video_shape", "dense_layers")


def read_config(path: PathLike) -> Config:
    """A `VSAConfig`, or the pattern form.

    Args:
        path: a JSON file with one of them; or a directory or repository with `vsa_config.json`.

    Raises:
        ValueError: there is no such file, or it holds something else.
    """
    file = Path(path)
    if not file.is_file():
        if file.is_dir() and not any((file / name).exists() for name in (CONFIG_NAME, INDEX_NAME)):
            raise ValueError(f"{path} has no {CONFIG_NAME}; VSAConfig.save_pretrained writes it.")
        return VSAConfig.from_pretrained(path)
    values = read_json(file)
    if values.keys() <= {field.name for field in fields(VSAConfig)}:
        return VSAConfig.from_file(file)
    try:
        return resolve_config(values, {})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} holds neither fields of VSAConfig nor patterns: {error}") from error


def read_fields(text: str) -> dict[str, Any]:
    """`"ratio=0.2,dense_steps=0.1,block_size=4x4x4"` as fields of `VSAConfig`.

    Raises:
        ValueError: a field is unknown, or not of the form NAME=VALUE.
    """
    given: dict[str, str] = {}
    name = ""
    for part in text.split(","):
        before, equals, value = part.partition("=")
        if equals:
            name = before.strip().replace("-", "_")
            given[name] = value.strip()
        elif name in given:  # a later number of a list
            given[name] += f",{part.strip()}"
        else:
            raise ValueError(f"{part!r} is not of the form NAME=VALUE, for example ratio=0.2,dense_steps=0.1.")
    unknown = [name for name in given if name not in _FIELDS]
    if unknown:
        raise ValueError(f"{text!r} sets {', '.join(unknown)}; known are {', '.join(_FIELDS)}.")
    return {_FIELDS[name]: read_value(_FIELDS[name], value) for name, value in given.items()}


def read_value(field: str, text: str) -> Any:
    """The value of one field of `VSAConfig`: "4x4x4" or "4,4,4", "0,-1", "auto", "2" (a count), "0.2" (a share).

    A schedule is "front", or a ramp from one ratio to another, perhaps with a power: "0.5:0.05", "0.8:0.05:2".
    """
    if field in _TUPLES and _NUMBERS.fullmatch(text):
        return tuple(int(number) for number in re.findall(r"-?\d+", text))
    if field == "modules":
        return tuple(text.split("+"))
    if field == "schedule" and _RAMP.fullmatch(text):
        return RatioSchedule.ramp(*map(float, text.split(":")))
    try:
        return json.loads(text)
    except ValueError:
        return text


def check_sparse(changes: Mapping[str, Any], *, config: PathLike | None = None, vsa: PathLike | None = None) -> None:
    """Refuse what `make_sparse` would refuse of its fields and file, whatever the model."""
    if vsa is not None and config is not None:
        raise ValueError(f"vsa={str(vsa)!r} brings its own config; leave config={str(config)!r} out.")
    resolve_config(None if config is None else read_config(config), {**VSAConfig().to_dict(), **changes})


def make_sparse(
    pipe: Any, changes: Mapping[str, Any], *, config: PathLike | None = None, vsa: PathLike | None = None
) -> None:
    """Enable VSA with these fields, or with those and a file of `read_config`, or as `save_vsa` left it.

    Raises:
        ValueError, TypeError: what `enable_vsa` or `load_vsa` refuses, or both files at once.
    """
    check_sparse(changes, config=config, vsa=vsa)
    if vsa is not None:
        load_vsa(pipe, vsa, **changes)
    else:
        enable_vsa(pipe, config=None if config is None else read_config(config), **changes)
