"""One way to make a video, and its name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import VSAConfig
from ..generation.sparsity import Config, read_config, read_fields
from ..schedule import RatioSchedule

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True)
class Setting:
    """How a video is made.

    Args:
        name: what it is called in the report.
        config: as `enable_vsa` takes it; `None` is dense.
        pipe: the pipeline with weights of its own, where they are not those of the pipeline that is compared.
    """

    name: str
    config: Config | None = None
    pipe: DiffusionPipeline | None = None

    @property
    def slug(self) -> str:
        """The name in a form that files may have."""
        return re.sub(r"[^a-z0-9.]+", "-", self.name.lower()).strip("-.")

    def to_dict(self) -> dict[str, Any] | None:
        """The config, ready for JSON."""
        if isinstance(self.config, VSAConfig):
            return self.config.to_dict()
        return None if self.config is None else {pattern: _listed(entry) for pattern, entry in self.config.items()}


def _listed(entry: Any) -> Any:
    """An entry of the pattern form, its schedule perhaps one that was read already."""
    if not isinstance(entry, Mapping):
        return entry
    return {name: asdict(value) if isinstance(value, RatioSchedule) else value for name, value in entry.items()}


DENSE = Setting("dense")


def as_setting(value: Setting | VSAConfig | float) -> Setting:
    """A setting as it is; a config or a `top_k_ratio` under the name of its ratio."""
    if isinstance(value, Setting):
        return value
    config = value if isinstance(value, VSAConfig) else VSAConfig(top_k_ratio=value)
    return Setting(f"VSA {config.top_k_ratio:g}" if config.top_k is None else f"VSA top {config.top_k}", config)


def read_setting(text: str) -> Setting:
    """`"fast=ratio=0.2,dense_steps=0.1,block_size=auto"`, `"fast=settings.json"`, or a file or directory alone.

    Raises:
        ValueError: it has another form, or a field or file is wrong.
    """
    if Path(text).exists():
        return Setting(Path(text).stem, read_config(text))
    name, _, rest = text.partition("=")
    if not name.strip() or not rest:
        raise ValueError(f"{text!r} is neither NAME=FIELD=VALUE,... nor a file; write fast=ratio=0.2,dense_steps=0.1.")
    if "=" in rest:
        return Setting(name.strip(), VSAConfig(**read_fields(rest)))
    return Setting(name.strip(), read_config(rest))


def check_names(settings: Sequence[Setting]) -> None:
    """Raise `ValueError` if two settings would be of one name, or of one file name."""
    seen: dict[str, str] = {}
    for setting in settings:
        if not setting.slug:
            raise ValueError(f"the setting {setting.name!r} needs letters or digits in its name.")
        if setting.slug in seen:
            raise ValueError(
                f"the settings {seen[setting.slug]!r} and {setting.name!r} share a name; give each its own."
            )
        seen[setting.slug] = setting.name
