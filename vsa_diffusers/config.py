"""`VSAConfig`, its JSON form, and the pattern form that configures attention modules one by one."""

from __future__ import annotations

import fnmatch
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from .attention import COMBINES, IMPLEMENTATIONS, check_auto_block_size, check_choice
from .selection import SELECTIONS
from .tiles import check_block_size, check_top_k, check_video_shape

CONFIG_NAME = "vsa_config.json"

VSA_DEFAULT: dict[str, Any] = {
    "sparse_cfg": {
        "*": {"method": "vsa", "block_size_3d": [4, 4, 4], "top_k_ratio": 0.5, "enable": True},
        "default": {"enable": False},
    }
}
"""The pattern form with its usual values: every video self-attention, half of the tiles kept."""

# Keys of the pattern form, and the field of VSAConfig that each one sets.
_PATTERN_KEYS = {
    "block_size_3d": "block_size",
    "block_size": "block_size",
    "top_k_ratio": "top_k_ratio",
    "top_k": "top_k",
    "video_shape": "video_shape",
    "combine": "combine",
    "selection": "selection",
    "implementation": "implementation",
}


@dataclass(frozen=True)
class VSAConfig:
    """How sparse the video self-attention of a transformer becomes, and where.

    Args:
        top_k_ratio: share of key tiles that each query tile keeps, in (0, 1]; lower is sparser and faster.
        top_k: number of key tiles to keep, instead of `top_k_ratio`.
        block_size: `(t, h, w)`, tokens per tile along each axis, at most 128 in all; or `"auto"`, the block that
            wastes least on each video shape (for modules without trained gates).
        combine: `"gate"`, `"sum"`, `"sparse"`, `"merge"` (see `video_sparse_attention`), or `"auto"`: "gate" where an
            attention module has a `to_gate_compress` that is not all zeros, else "merge".
        video_shape: `(T, H, W)`, the grid of video tokens; `None` reads it from the transformer's inputs.
        dense_steps: first denoising steps that stay dense, as a count (int) or as a share of all steps (float).
        dense_layers: positions of video self-attention modules that stay dense; negative ones count from the end.
        modules: patterns (`fnmatch`) of module names that become sparse; `None` means every video self-attention.
        implementation: as in `video_sparse_attention`.
        selection: `"mean"` or `"quarters"` (see `video_sparse_attention`), or `"auto"`: "quarters" where `combine`
            comes out as "merge", else "mean", by which models with gates have been trained.

    Raises:
        ValueError: a field is not as described; the message names it, its value and the mend.
    """

    top_k_ratio: float = 0.5
    top_k: int | None = None
    block_size: tuple[int, int, int] | str = (4, 4, 4)
    combine: str = "auto"
    video_shape: tuple[int, int, int] | None = None
    dense_steps: int | float = 0
    dense_layers: tuple[int, ...] = ()
    modules: tuple[str, ...] | None = None
    implementation: str = "auto"
    selection: str = "auto"

    def __post_init__(self) -> None:
        check_top_k(self.top_k, self.top_k_ratio)
        check_choice("combine", self.combine, ("auto", *COMBINES))
        check_choice("implementation", self.implementation, IMPLEMENTATIONS)
        check_choice("selection", self.selection, ("auto", *SELECTIONS))
        steps = self.dense_steps
        whole = isinstance(steps, int) and not isinstance(steps, bool) and steps >= 0
        if not whole and not (isinstance(steps, float) and 0 <= steps <= 1):
            raise ValueError(f"dense_steps={steps!r} must be a number of steps (int) or a share of them (0.0 to 1.0).")
        if isinstance(self.block_size, str):
            check_auto_block_size(self.block_size, self.combine)
        else:
            self._set("block_size", check_block_size(self.block_size))
        if self.video_shape is not None:
            self._set("video_shape", check_video_shape(self.video_shape))
        self._set("dense_layers", _tuple_of("dense_layers", self.dense_layers, int, "(0, 1, -1)"))
        if self.modules is not None:
            self._set("modules", _tuple_of("modules", self.modules, str, '("blocks.*.attn1",)'))

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings, ready for JSON."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> VSAConfig:
        """The inverse of `to_dict`; an unknown key is a `ValueError`."""
        known = [field.name for field in fields(cls)]
        _check_keys("VSAConfig", values, known)
        return cls(**values)

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write `vsa_config.json` into `directory`, which is created if need be."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        (Path(directory) / CONFIG_NAME).write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, path_or_repo: str | os.PathLike[str]) -> VSAConfig:
        """Read `vsa_config.json` from a directory, or from a repository on the Hugging Face Hub."""
        path = Path(path_or_repo) / CONFIG_NAME
        if not Path(path_or_repo).exists():
            from huggingface_hub import hf_hub_download

            path = Path(hf_hub_download(str(path_or_repo), CONFIG_NAME))
        return cls.from_dict(json.loads(path.read_text()))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)


def module_configs(
    config: VSAConfig | Mapping[str, Any], video_modules: Sequence[str], other_modules: Sequence[str]
) -> dict[str, VSAConfig]:
    """The config of every module that becomes sparse.

    Args:
        config: a `VSAConfig`, or the pattern form.
        video_modules: names of the transformer's video self-attention modules, in order.
        other_modules: names of its other attention modules, which are never sparse but which a pattern may name.

    Raises:
        ValueError: unknown keys, a layer that does not exist, or a pattern that matches nothing it could serve.
    """
    if isinstance(config, VSAConfig):
        chosen = set(video_modules)
        if config.modules is not None:
            chosen = set()
            for pattern in config.modules:
                chosen.update(_match("modules", pattern, video_modules))
        for layer in config.dense_layers:
            if not -len(video_modules) <= layer < len(video_modules):
                raise ValueError(
                    f"dense_layers={config.dense_layers} names layer {layer}, but there are {len(video_modules)} video "
                    f"self-attention layers; use 0 to {len(video_modules) - 1}, or negative numbers from the end."
                )
            chosen.discard(video_modules[layer])
        return {name: config for name in video_modules if name in chosen}

    settings: dict[str, dict[str, Any]] = {name: {"enable": False} for name in video_modules}
    patterns = _pattern_form(config)
    for name in video_modules:
        settings[name] |= patterns.get("default", {})
    for pattern, values in patterns.items():
        if pattern == "default":
            continue
        names = [name for name in video_modules if fnmatch.fnmatchcase(name, pattern)]
        if values["enable"] or not any(fnmatch.fnmatchcase(name, pattern) for name in other_modules):
            names = _match("config", pattern, video_modules)
        for name in names:
            settings[name] |= values
    return {name: VSAConfig(**_without_enable(values)) for name, values in settings.items() if values["enable"]}


def _pattern_form(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Check the pattern form and translate its keys into fields of `VSAConfig`, plus `enable`."""
    if not isinstance(config, Mapping):
        raise TypeError(f"config={config!r} must be a VSAConfig or a dict of patterns, for example VSA_DEFAULT.")
    if "sparse_cfg" in config:
        _check_keys("config", config, ["sparse_cfg"])
        config = config["sparse_cfg"]
    patterns = {}
    for pattern, values in config.items():
        if not isinstance(values, Mapping):
            raise TypeError(f"config[{pattern!r}]={values!r} must be a dict, for example {{'enable': False}}.")
        _check_keys(f"config[{pattern!r}]", values, ["method", "enable", *_PATTERN_KEYS])
        check_choice(f"config[{pattern!r}]['method']", values.get("method", "vsa"), ["vsa"])
        patterns[pattern] = {_PATTERN_KEYS[key]: value for key, value in values.items() if key in _PATTERN_KEYS}
        patterns[pattern]["enable"] = bool(values.get("enable", True))
        VSAConfig(**_without_enable(patterns[pattern]))
    return patterns


def _without_enable(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key != "enable"}


def _match(argument: str, pattern: str, video_modules: Sequence[str]) -> list[str]:
    names = [name for name in video_modules if fnmatch.fnmatchcase(name, pattern)]
    if not names:
        raise ValueError(
            f"{argument} has the pattern {pattern!r}, which matches no video self-attention; "
            f"there are: {', '.join(video_modules)}."
        )
    return names


def _check_keys(name: str, values: Mapping[str, Any], known: Sequence[str]) -> None:
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(f"{name} has unknown keys {unknown}; known are {sorted(known)}.")


def _tuple_of(name: str, value: Any, kind: type, example: str) -> tuple:
    if isinstance(value, str) or not isinstance(value, Sequence) or not all(type(item) is kind for item in value):
        raise ValueError(f"{name}={value!r} must be a sequence of {kind.__name__}, for example {name}={example}.")
    return tuple(value)


def make_config(config: VSAConfig | None, changes: Mapping[str, Any]) -> VSAConfig:
    """A `VSAConfig` from either a config or its fields; both at once are merged, the fields winning."""
    _check_keys("VSAConfig", changes, [field.name for field in fields(VSAConfig)])
    return replace(config, **changes) if config is not None else VSAConfig(**changes)
