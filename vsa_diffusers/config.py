"""`VSAConfig`, its JSON form, and the pattern form that configures attention modules one by one."""

from __future__ import annotations

import difflib
import fnmatch
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from .attention import COMBINES, IMPLEMENTATIONS, check_auto_block_size, check_choice
from .directories import current_file, read_unchanged
from .files import local_directory, read_json, replaced_file
from .schedule import RatioSchedule, check_schedule
from .selection import SELECTIONS
from .tiles import check_block_size, check_top_k, check_video_shape

CONFIG_NAME = "vsa_config.json"
INDEX_NAME = "vsa_index.json"

VSA_DEFAULT: dict[str, Any] = {
    "sparse_cfg": {
        "*": {"method": "vsa", "block_size_3d": [4, 4, 4], "top_k_ratio": 0.5, "enable": True},
        "default": {"enable": False},
    }
}
"""The pattern form with its usual values: every video self-attention, half of the tiles kept.

The pattern form maps patterns (`fnmatch`) of module names to fields of `VSAConfig`. Later patterns override earlier
ones, key by key, and "default" is what all begin with. `dense_steps` may differ from pattern to pattern;
`dense_layers` counts the video self-attention modules that its own pattern matches, in "default" all of them:

    {"default": {"enable": False, "dense_steps": 2}, "blocks.*.attn1": {"top_k_ratio": 0.2, "dense_layers": [0, -1]}}
"""

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
    "dense_steps": "dense_steps",
    "dense_layers": "dense_layers",
    "schedule": "schedule",
}
# Two ways to say how many tiles are kept; one entry says it in one of them.
_OTHER_COUNT = {"top_k": "top_k_ratio", "top_k_ratio": "top_k"}
_NUMBERS = ("top_k_ratio", "top_k", "block_size", "video_shape", "dense_steps")


@dataclass(frozen=True)
class VSAConfig:
    """How sparse the video self-attention of a transformer becomes, and where.

    Args:
        top_k_ratio: share of key tiles that each query tile keeps, in (0, 1]; lower is sparser and faster.
        top_k: number of key tiles to keep, instead of `top_k_ratio`, which must be left at its default then.
        block_size: `(t, h, w)`, tokens per tile along each axis, at most 128 in all; or `"auto"`, the block that
            wastes least on each video shape (for modules without trained gates). `None`: "auto" where `combine` comes
            out as "merge", else (4, 4, 4), which gates have been trained for.
        combine: `"gate"`, `"sum"`, `"sparse"`, `"merge"` (see `video_sparse_attention`), or `"auto"`: "gate" where an
            attention module has a `to_gate_compress` that is not all zeros, else "merge".
        video_shape: `(T, H, W)`, the grid of video tokens; `None` reads it from the transformer's inputs.
        dense_steps: first denoising steps that stay dense, as a count (int) or as a share of all steps (float).
        dense_layers: positions of video self-attention modules that stay dense; negative ones count from the end.
        modules: patterns (`fnmatch`) of module names that become sparse, at least one; `None` means every video
            self-attention.
        implementation: as in `video_sparse_attention`.
        selection: `"mean"` or `"quarters"` (see `video_sparse_attention`), or `"auto"`: "quarters" where `combine`
            comes out as "merge", else "mean", by which models with gates have been trained.
        schedule: how the ratio changes over a denoising run. `"constant"`; `"front"`: `top_k_ratio` is the mean over
            the run, and the first steps keep more than the last; a `RatioSchedule`, which says every ratio itself, or
            a dict of its fields; or `"auto"`: "front" where `combine` comes out as "merge" and
            there is no `top_k`, else "constant". Outside of a run it is its mean.

    Numbers and arrays of numpy are kept as Python's own numbers and tuples.

    Raises:
        ValueError: a field is not as described; the message names it, its value and the mend.
    """

    top_k_ratio: float = 0.5
    top_k: int | None = None
    block_size: tuple[int, int, int] | str | None = None
    combine: str = "auto"
    video_shape: tuple[int, int, int] | None = None
    dense_steps: int | float = 0
    dense_layers: tuple[int, ...] = ()
    modules: tuple[str, ...] | None = None
    implementation: str = "auto"
    selection: str = "auto"
    schedule: str | RatioSchedule = "auto"

    def __post_init__(self) -> None:
        for field in fields(self):
            self._set(field.name, _plain(getattr(self, field.name)))
        for name in _NUMBERS:
            _refuse_bool(name, getattr(self, name))
        check_top_k(self.top_k, self.top_k_ratio)
        self._set("top_k_ratio", float(self.top_k_ratio))
        if self.top_k is not None:
            self._set("top_k", int(self.top_k))
            if self.top_k_ratio != type(self).top_k_ratio:
                raise ValueError(
                    f"top_k={self.top_k} and top_k_ratio={self.top_k_ratio} both say how many tiles are kept; pass one."
                )
        check_choice("combine", self.combine, ("auto", *COMBINES))
        check_choice("implementation", self.implementation, IMPLEMENTATIONS)
        check_choice("selection", self.selection, ("auto", *SELECTIONS))
        _check_dense_steps(self.dense_steps)
        self._set("schedule", check_schedule(self.schedule))
        if self.schedule not in ("auto", "constant") and self.top_k is not None:
            raise ValueError(f"top_k={self.top_k} is constant, but schedule={self.schedule!r}; pass top_k_ratio.")
        if isinstance(self.schedule, RatioSchedule) and self.top_k_ratio != type(self).top_k_ratio:
            raise ValueError(
                f"top_k_ratio={self.top_k_ratio} and schedule={self.schedule!r} both say how many tiles are kept; pass "
                'one, or schedule="front" for that mean.'
            )
        if isinstance(self.block_size, str):
            check_auto_block_size(self.block_size, self.combine)
        elif self.block_size is not None:
            self._set("block_size", check_block_size(self.block_size))
        if self.video_shape is not None:
            self._set("video_shape", check_video_shape(self.video_shape))
        self._set("dense_layers", _tuple_of("dense_layers", self.dense_layers, int, "(0, 1, -1)"))
        if self.modules is not None:
            self._set("modules", _tuple_of("modules", self.modules, str, '("blocks.*.attn1",)'))
            if not all(self.modules) or not self.modules:
                raise ValueError(f"modules={self.modules!r} must name modules; leave it at None for all of them.")

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings, ready for JSON."""
        return {name: _listed(value) for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> VSAConfig:
        """The inverse of `to_dict`; an unknown key is a `ValueError`, and anything but a mapping a `TypeError`."""
        if not isinstance(values, Mapping):
            raise TypeError(f"VSAConfig.from_dict({values!r}) must get a dict of fields, as to_dict returns it.")
        known = [field.name for field in fields(cls)]
        _check_keys("VSAConfig", values, known)
        return cls(**values)

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write `vsa_config.json` into `directory`, which is created if need be, as a whole or not at all."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        with replaced_file(Path(directory) / CONFIG_NAME) as partial:
            partial.write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, path_or_repo: str | os.PathLike[str]) -> VSAConfig:
        """Read `vsa_config.json` from a directory, or from a repository on the Hugging Face Hub.

        Raises:
            ValueError: there is no such directory or file, or it holds something else than a `VSAConfig`.
        """
        directory = local_directory(path_or_repo, [CONFIG_NAME, INDEX_NAME])

        def read() -> VSAConfig:
            path = current_file(directory, INDEX_NAME, CONFIG_NAME)
            if not path.exists():
                raise ValueError(f"{directory} lacks {CONFIG_NAME}; VSAConfig.save_pretrained writes it.")
            return cls.from_file(path)

        return read_unchanged(directory, INDEX_NAME, read)

    @classmethod
    def from_file(cls, path: Path) -> VSAConfig:
        """Read such a file; errors name it. One from before there were schedules means a constant ratio."""
        values = read_json(path)
        others = {field.name for field in fields(cls)} - {"schedule"}
        if isinstance(values, dict) and "schedule" not in values and others <= set(values):
            values = {**values, "schedule": "constant"}
        try:
            return cls.from_dict(values)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} holds no VSAConfig: {error}") from error

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)


def resolve_config(
    config: VSAConfig | Mapping[str, Any] | None, arguments: Mapping[str, Any]
) -> VSAConfig | dict[str, dict[str, Any]]:
    """One config out of `config=` and the arguments beside it, which fill in what `config` leaves unset.

    Args:
        config: a `VSAConfig`, the pattern form, or `None`. A field at its default counts as unset.
        arguments: fields of `VSAConfig`; one that is at its default counts as not given.

    Returns:
        A `VSAConfig`, or the pattern form with its values checked; the arguments are part of its "default".

    Raises:
        ValueError, TypeError: an argument or the config is wrong, or the two contradict each other.
    """
    beside = make_config(None, arguments)
    given = _set_fields(beside)
    if config is None:
        return beside
    if isinstance(config, VSAConfig):
        for name in given:
            _refuse_contradiction("config", name, given[name], _set_fields(config))
        return replace(config, **given)
    entries = _pattern_form(config)
    if "modules" in given:
        raise ValueError(
            f"modules={beside.modules!r} was given together with config=, whose patterns name the modules; pass one."
        )
    for pattern, values in entries.items():
        for name in given:
            _refuse_contradiction(f"config[{pattern!r}]", name, given[name], values)
        if pattern != "default" and "dense_layers" in given and "dense_layers" in values:
            raise ValueError(
                f"dense_layers={beside.dense_layers!r} counts all layers, and those of config[{pattern!r}] what its "
                "pattern matches; put all of them into the config."
            )
    return entries | {"default": {"enable": False} | given | entries.get("default", {})} if given else entries


def module_configs(
    config: VSAConfig | Mapping[str, Any], video_modules: Sequence[str], other_modules: Sequence[str]
) -> dict[str, VSAConfig]:
    """The config of every module that becomes sparse.

    Args:
        config: a `VSAConfig`, or the pattern form.
        video_modules: names of the transformer's video self-attention modules, in order.
        other_modules: names of its other attention modules, which are never sparse but which a pattern may name.

    Returns:
        By name, in the order of `video_modules`. Out of the pattern form, each may have its own `dense_steps`, and
        `dense_layers` and `modules` are at their defaults: they are settled.

    Raises:
        ValueError: unknown keys, a layer that does not exist, or a pattern that matches nothing it could serve.
    """
    if isinstance(config, VSAConfig):
        chosen = set(video_modules)
        if config.modules is not None:
            chosen = set()
            for pattern in config.modules:
                chosen.update(_match("modules", pattern, video_modules))
        chosen -= _layers("dense_layers", config.dense_layers, video_modules)
        return {name: config for name in video_modules if name in chosen}

    settings: dict[str, dict[str, Any]] = {name: {"enable": False} for name in video_modules}
    entries = _pattern_form(config)
    for pattern in sorted(entries, key=lambda pattern: pattern != "default"):
        values = dict(entries[pattern])
        names = [name for name in video_modules if pattern == "default" or fnmatch.fnmatchcase(name, pattern)]
        is_other = any(fnmatch.fnmatchcase(name, pattern) for name in other_modules)
        if pattern != "default" and (values["enable"] or not is_other):
            names = _match("config", pattern, video_modules)
        dense = None
        if "dense_layers" in values:
            dense = _layers(f"config[{pattern!r}]['dense_layers']", values.pop("dense_layers"), names)
        for name in names:
            for count, other in _OTHER_COUNT.items():
                if values.get(count) is not None:
                    settings[name].pop(other, None)
            for other in _superseded(settings[name], values):
                del settings[name][other]
            settings[name] |= values
            if dense is not None:
                settings[name]["dense"] = name in dense
    return {
        name: VSAConfig(**{key: value for key, value in values.items() if key not in ("enable", "dense")})
        for name, values in settings.items()
        if values["enable"] and not values.get("dense")
    }


def make_config(config: VSAConfig | None, changes: Mapping[str, Any]) -> VSAConfig:
    """A `VSAConfig` from either a config or its fields; both at once are merged, the fields winning."""
    _check_keys("VSAConfig", changes, [field.name for field in fields(VSAConfig)])
    if config is None:
        return VSAConfig(**changes)
    given = {name for name in changes if changes[name] is not None}
    unset = {other: getattr(VSAConfig, other) for name, other in _OTHER_COUNT.items() if name in given}
    present = {name: value for name, value in vars(config).items() if name not in unset}
    for other in _superseded(present, {name: changes[name] for name in given}):
        unset[other] = "constant" if other == "schedule" else getattr(VSAConfig, other)
    return replace(config, **{**unset, **changes})


def _pattern_form(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Check the pattern form and translate its keys into fields of `VSAConfig`, plus `enable`."""
    if not isinstance(config, Mapping):
        raise TypeError(f"config={config!r} must be a VSAConfig or a dict of patterns, for example VSA_DEFAULT.")
    if "sparse_cfg" in config:
        _check_keys("config", config, ["sparse_cfg"])
        config = config["sparse_cfg"]
        if not isinstance(config, Mapping):
            raise TypeError(f"config['sparse_cfg']={config!r} must be a dict of patterns, for example VSA_DEFAULT.")
    if not config:
        raise ValueError("config={} has no patterns; leave config out to make every video self-attention sparse.")
    return {pattern: _entry(pattern, values) for pattern, values in config.items()}


def _entry(pattern: Any, values: Any) -> dict[str, Any]:
    """The checked fields of one pattern, and `enable`."""
    if not isinstance(pattern, str) or not pattern:
        raise TypeError(f"config has the pattern {pattern!r}, which must be a pattern of module names, such as '*'.")
    name = f"config[{pattern!r}]"
    if not isinstance(values, Mapping):
        is_field = pattern in (*_PATTERN_KEYS, "enable", "method")
        mend = f"put {pattern!r} into an entry, such as 'default'" if is_field else "for example {'enable': False}"
        raise TypeError(f"{name}={values!r} must be a dict; {mend}.")
    _check_keys(name, values, ["method", "enable", *_PATTERN_KEYS])
    check_choice(f"{name}['method']", values.get("method", "vsa"), ["vsa"])
    enable = _plain(values.get("enable", True))
    if not isinstance(enable, bool):
        raise ValueError(f"{name}['enable']={enable!r} must be True or False.")
    for first, second in (("block_size", "block_size_3d"), ("top_k", "top_k_ratio")):
        if values.get(first) is not None and values.get(second) is not None:
            raise ValueError(f"{name} has both {first!r} and {second!r}, which say the same in two ways; keep one.")
    given = {_PATTERN_KEYS[key]: value for key, value in values.items() if key in _PATTERN_KEYS}
    try:
        checked = VSAConfig(**given)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return {field: getattr(checked, field) for field in given} | {"enable": enable}


def _set_fields(config: VSAConfig) -> dict[str, Any]:
    """The fields that are not at their defaults."""
    return {name: value for name, value in vars(config).items() if value != getattr(VSAConfig, name)}


def _refuse_contradiction(config: str, name: str, value: Any, values: Mapping[str, Any]) -> None:
    """Raise `ValueError` if `values` sets the field otherwise, or says in the other way how many tiles are kept."""
    other = _OTHER_COUNT.get(name)
    for key in filter(None, (name, other)):
        present = values.get(key)
        # One dense step (1) is not a share of all steps (1.0).
        same = type(present) is type(value) and present == value
        if present is not None and (key == other or not same):
            raise ValueError(f"{name}={value!r} contradicts {key}={present!r} of {config}; pass one of the two.")


def _superseded(earlier: Mapping[str, Any], later: Mapping[str, Any]) -> list[str]:
    """Fields said earlier that what is said later about the number of tiles takes the place of."""
    fields = []
    schedule = earlier.get("schedule", "auto")
    if "schedule" in later:
        schedule = check_schedule(later["schedule"])
        if schedule not in ("auto", "constant"):
            fields.append("top_k")
        if isinstance(schedule, RatioSchedule):
            fields.append("top_k_ratio")
    elif schedule not in ("auto", "constant") and (
        later.get("top_k") is not None or (later.get("top_k_ratio") is not None and isinstance(schedule, RatioSchedule))
    ):
        fields.append("schedule")
    return [name for name in fields if name in earlier and name not in later]


def _layers(name: str, layers: Sequence[int], modules: Sequence[str]) -> set[str]:
    """The modules at these positions, or a `ValueError`."""
    for layer in layers:
        if not -len(modules) <= layer < len(modules):
            raise ValueError(
                f"{name}={layers} names layer {layer}, but there are {len(modules)} video self-attention layers; "
                f"use 0 to {len(modules) - 1}, or negative numbers from the end."
            )
    return {modules[layer] for layer in layers}


def _match(argument: str, pattern: str, video_modules: Sequence[str]) -> list[str]:
    names = [name for name in video_modules if fnmatch.fnmatchcase(name, pattern)]
    if not names:
        closest = difflib.get_close_matches(pattern, working := _working_patterns(video_modules), n=1, cutoff=0)
        first, last = video_modules[0], video_modules[-1]
        raise ValueError(
            f"{argument} has the pattern {pattern!r}, which matches no video self-attention; use "
            f"{(closest or working)[0]!r}: there are {len(video_modules)}, {first} to {last}."
        )
    return names


def _working_patterns(video_modules: Sequence[str]) -> list[str]:
    """Patterns that match by the last part of a name, which is what layers of one kind share."""
    parts = [name.rpartition(".") for name in video_modules]
    return list(dict.fromkeys(f"*.{last}" if parent else last for parent, _, last in parts))


def _check_keys(name: str, values: Mapping[str, Any], known: Sequence[str]) -> None:
    unknown = sorted(set(values) - set(known), key=str)
    if unknown:
        alike = dict.fromkeys(match for key in unknown for match in difflib.get_close_matches(str(key), known, n=1))
        hint = f"; perhaps {' and '.join(map(repr, alike))} is meant." if alike else "."
        raise ValueError(f"{name} has unknown keys {unknown}; known are {sorted(known)}{hint}")


def _check_dense_steps(steps: Any) -> None:
    whole = isinstance(steps, int) and steps >= 0
    if not whole and not (isinstance(steps, float) and 0 <= steps <= 1):
        raise ValueError(f"dense_steps={steps!r} must be a number of steps (int) or a share of them (0.0 to 1.0).")


def _refuse_bool(name: str, value: Any) -> None:
    if any(isinstance(item, bool) for item in (value if isinstance(value, (list, tuple)) else (value,))):
        raise ValueError(f"{name}={value!r} must hold numbers; True and False are none.")


def _plain(value: Any) -> Any:
    """Numbers and arrays of numpy as Python's own, also inside of a list or tuple."""
    if isinstance(value, (list, tuple)):
        items = [_plain(item) for item in value]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, (bool, str, type, Mapping)):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        # The shortest decimal: numpy's float32 0.2 is 0.2, not 0.20000000298, which would keep a tile more.
        return float(str(value)) if hasattr(value, "dtype") else float(value)
    return _plain(value.tolist()) if hasattr(value, "tolist") else value


def _listed(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _listed(each) for name, each in value.items()}
    return [_listed(each) for each in value] if isinstance(value, tuple) else value


def _tuple_of(name: str, value: Any, kind: type, example: str) -> tuple:
    if (
        isinstance(value, (str, bytes))
        or not isinstance(value, Sequence)
        or any(type(item) is not kind for item in value)
    ):
        raise ValueError(f"{name}={value!r} must be a sequence of {kind.__name__}, for example {name}={example}.")
    return tuple(value)
