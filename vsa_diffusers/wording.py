"""How messages, the status and `repr` put what they have in common."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from itertools import groupby
from typing import Any


def settings(config: Any) -> dict[str, Any]:
    """The fields of a `VSAConfig` that say how its modules are sparse: the usual ones, and all others that are set."""
    count = "top_k_ratio" if config.top_k is None else "top_k"
    if not isinstance(config.schedule, str):
        count = "schedule"
    usual = (count, "combine", "selection", "block_size")
    others = [
        field.name
        for field in dataclasses.fields(config)
        if field.name not in (*usual, "modules", "dense_layers")
        and getattr(config, field.name) != field.default
        and (field.name, getattr(config, field.name)) != ("schedule", "constant")
    ]
    return {name: getattr(config, name) for name in (*usual, *others)}


def as_arguments(values: dict[str, Any]) -> str:
    """`{"top_k": 3}` as top_k=3."""
    return ", ".join(f"{name}={value!r}" for name, value in values.items())


def by(extents: Iterable[int]) -> str:
    """`(21, 30, 52)` as 21x30x52."""
    return "x".join(map(str, extents))


def grouped(names: Iterable[str]) -> str:
    """Names of modules, those of one kind together: "blocks.0.attn1" to "blocks.29.attn1" are "blocks.0-29.attn1"."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for name in names:
        numbered = re.fullmatch(r"(.*?\.|)(\d+)(\..*|)", name)
        if numbered is None:
            groups.setdefault((name,), [])
        else:
            before, number, after = numbered.groups()
            groups.setdefault((before, after), []).append(int(number))
    return ", ".join(_runs(numbers).join(around) for around, numbers in groups.items())


def _runs(numbers: Iterable[int]) -> str:
    runs = []
    # In a run, a number and its place in order are equally far apart.
    for _, run in groupby(enumerate(sorted(set(numbers))), lambda item: item[1] - item[0]):
        first, *rest = [number for _, number in run]
        runs.append(f"{first}-{rest[-1]}" if rest else str(first))
    return runs[0] if len(runs) == 1 else f"{{{','.join(runs)}}}"
