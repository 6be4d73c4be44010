"""`vsa_status`: what is sparse in a pipeline, what ran so far, and why."""

from __future__ import annotations

import html
import io
from collections.abc import Container, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from .attn_processor import VSAAttnProcessor
from .config import VSAConfig
from .gate_state import GATE, is_plain
from .models import Family, require_family
from .operators import why_not_kernels
from .pipeline import installed_hooks, supported_parts
from .problem import Problem
from .record import Record, Tiling, served_by, told
from .running import hooks_by_hand
from .tiles import TileGrid
from .wording import as_arguments, grouped, settings

BY_ENABLING, BY_HAND = "enable_vsa", "set_attn_processor"
WIDTH = 100
UNSEEN = "in compiled code, or left out by a cache or LayerSkip"


@dataclass(frozen=True)
class SparseModules:
    """Sparse modules that are configured alike.

    Args:
        modules: their names.
        config: theirs, with choices settled once they are known.
    """

    modules: tuple[str, ...]
    config: VSAConfig

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        values = self.config.to_dict()
        return {"modules": list(self.modules), "settings": {name: values[name] for name in settings(self.config)}}


@dataclass(frozen=True)
class TransformerStatus:
    """Of one transformer.

    Args:
        name: in the pipeline; "transformer" for one by itself.
        model: its class.
        family: what it is served as.
        enabled_by: "enable_vsa", "set_attn_processor", or `None`.
        sparse: its sparse modules.
        dense: its video self-attention modules that are not sparse.
        replaced: of those that were made sparse, the ones with another processor since, and its class.
        never_sparse: what is never sparse in its family.
        gates: number of video self-attention modules that have one, and of those that use it.
        implementation: "triton" or "torch", which served the last sparse call, or will serve the first as it looks;
            `None` where that cannot be told yet.
        obstacle: why it is not "triton".
        grids: how the last forward cut the video; several where modules are configured otherwise than others.
        forwards: that have ended since VSA was enabled. All further counts are of calls in these.
        sparse_calls: of the sparse operation, in compiled code, too.
        dense_calls: by reason; those of layers that stay dense in every forward are not counted.
        unseen_calls: in compiled code, where only the sparse operation and what holds for the whole forward can be
            counted; or not made at all, since a cache or LayerSkip left them out.
    """

    name: str
    model: str
    family: str
    enabled_by: str | None = None
    sparse: tuple[SparseModules, ...] = ()
    dense: tuple[str, ...] = ()
    replaced: Mapping[str, str] = field(default_factory=dict)
    never_sparse: str = ""
    gates: tuple[int, int] = (0, 0)
    implementation: str | None = None
    obstacle: str | None = None
    grids: tuple[Tiling, ...] = ()
    forwards: int = 0
    sparse_calls: int = 0
    dense_calls: Mapping[str, int] = field(default_factory=dict)
    unseen_calls: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}
        return values | {
            "sparse": [group.to_dict() for group in self.sparse],
            "replaced": dict(self.replaced),
            "gates": dict(zip(("modules", "used"), self.gates, strict=True)),
            "grids": [_plain(asdict(grid)) for grid in self.grids],
            "dense_calls": dict(self.dense_calls),
        }

    def rows(self) -> Iterator[tuple[str, str]]:
        """What the tables show: what it is about, and what there is to say."""
        yield "VSA", f"enabled by {self.enabled_by}" if self.enabled_by else "not enabled; call enable_vsa(pipe)"
        for group in self.sparse:
            yield "sparse", f"{grouped(group.modules)} ({len(group.modules)}): {as_arguments(settings(group.config))}"
        dense = [f"{grouped(self.dense)} ({len(self.dense)})"] if self.dense else []
        yield "dense", "; ".join([*dense, self.never_sparse])
        if self.replaced:
            what = ", ".join(f"{name} ({processor})" for name, processor in self.replaced.items())
            yield "replaced since", f"{what}; call enable_vsa again"
        if self.gates[0]:
            yield "gates", f"{self.gates[0]} modules have one, {self.gates[1]} use it"
        if self.enabled_by is None:
            return
        expected = "" if self.sparse_calls or self.implementation is None else "expected: "
        yield "runs in", expected + served_by(self.implementation, self.obstacle)
        yield "last video", told(self.grids) if self.grids else "none yet"
        yield (
            "calls so far",
            f"{self.sparse_calls} sparse, {sum(self.dense_calls.values())} dense, in {self.forwards} forwards",
        )
        for reason, count in self.dense_calls.items():
            yield "ran dense", f"{count}: {reason}"
        if self.unseen_calls:
            yield "not seen", f"{self.unseen_calls}: {UNSEEN}"


@dataclass(frozen=True, repr=False)
class VSAStatus:
    """What `vsa_status` returns. It prints as a table, in a notebook, too.

    Args:
        transformers: every supported video transformer of the pipeline.
        reason: why there is none.
    """

    transformers: tuple[TransformerStatus, ...] = ()
    reason: str | None = None

    @property
    def enabled(self) -> bool:
        """Whether VSA is enabled on any of them."""
        return any(transformer.enabled_by for transformer in self.transformers)

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        transformers = {transformer.name: transformer.to_dict() for transformer in self.transformers}
        return {"enabled": self.enabled, "reason": self.reason, "transformers": transformers}

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        if self.reason is not None:
            return Text(self.reason)
        tables = []
        for transformer in self.transformers:
            table = Table(title=_title(transformer), title_justify="left", show_header=False)
            table.add_column(style="bold", no_wrap=True)
            table.add_column(overflow="fold")
            for label, text in transformer.rows():
                table.add_row(Text(label), Text(text))
            tables.append(table)
        return Group(*tables)

    def __str__(self) -> str:
        from rich.console import Console

        lines = io.StringIO()
        Console(file=lines, width=WIDTH, color_system=None, force_jupyter=False).print(self)
        return "\n".join(line.rstrip() for line in lines.getvalue().splitlines())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        if self.reason is not None:
            return f"<p>{html.escape(self.reason)}</p>"
        return "".join(
            f"<table><caption>{html.escape(_title(transformer))}</caption>{_html_rows(transformer)}</table>"
            for transformer in self.transformers
        )


def vsa_status(pipe: Any) -> VSAStatus:
    """What is sparse in a pipeline and how, what ran so far, and why what ran dense did.

        print(vsa_status(pipe))

    Calls are counted outside of compiled code, and cost no graph break: see `TransformerStatus` for what that leaves
    out. Counts begin when VSA is enabled; with one `VSAAttnProcessor` for all modules, after its first forward.

    Args:
        pipe: a pipeline or transformer, whether VSA is enabled on it or not.

    Returns:
        An object that prints as a table; `to_dict()` is ready for JSON, and `transformers` has one entry for each.

    Raises:
        TypeError: `pipe` is neither a pipeline nor a module.
    """
    try:
        parts = supported_parts(pipe)
    except ValueError as error:
        return VSAStatus(reason=str(error))
    return VSAStatus(tuple(_status(name, transformer) for name, transformer in parts.items()))


def _status(name: str, transformer: torch.nn.Module) -> TransformerStatus:
    family = require_family(transformer)
    modules = family.video_modules(transformer)
    hooks = installed_hooks(transformer)
    enabled_by = BY_HAND if hooks is None else BY_ENABLING
    hooks = hooks or hooks_by_hand(transformer)
    processors = {} if hooks is None else hooks.sparse_processors()
    configs = {name: each.config for name, each in processors.items() if not each.stays_dense}
    configs |= _before_first_call(modules, processors)
    coarse = tuple(name for name, each in processors.items() if each.stays_dense)
    replaced = {} if hooks is None or enabled_by == BY_HAND else hooks.replaced_processors()
    record = Record() if hooks is None else hooks.record
    implementation, obstacle = record.implementation, record.obstacle
    if implementation is None and configs:
        first = next(iter(configs))
        implementation, obstacle = _expected(transformer, modules[first], family, configs[first])
    alike: dict[VSAConfig, list[str]] = {}
    for module, config in configs.items():
        alike.setdefault(config, []).append(module)
    gated = [module for module, attn in modules.items() if hasattr(attn, GATE)]
    return TransformerStatus(
        name,
        type(transformer).__name__,
        family.name,
        enabled_by if configs or coarse or replaced else None,
        tuple(SparseModules(tuple(names), config) for config, names in alike.items()),
        tuple(module for module in modules if module not in configs and module not in replaced),
        replaced,
        family.stays_dense,
        (len(gated), sum(name in coarse or (name in configs and configs[name].combine == "gate") for name in gated)),
        implementation,
        obstacle,
        record.tilings,
        record.forwards,
        record.sparse,
        {record.reasons[kind]: count for kind, count in dict(record.dense).items()},
        record.unseen,
    )


def _before_first_call(modules: Mapping[str, torch.nn.Module], known: Container[str]) -> dict[str, VSAConfig]:
    """Modules that share a `VSAAttnProcessor`, which learns at its first call what it serves."""
    processors = {name: getattr(attn, "processor", None) for name, attn in modules.items() if name not in known}
    return {name: each.config for name, each in processors.items() if isinstance(each, VSAAttnProcessor)}


def _expected(
    transformer: torch.nn.Module, attn: torch.nn.Module, family: Family, config: VSAConfig
) -> tuple[str | None, str | None]:
    """The implementation that will serve such a module as it lies now, and why not the kernels.

    Of offloaded and quantised modules, what they compute in shows when they do.
    """
    weight = getattr(getattr(attn, family.query_projection, None), "weight", None)
    heads = getattr(attn, "heads", None) or getattr(attn, "num_heads", None)
    is_offloaded = any(hasattr(module, "_hf_hook") for module in (transformer, attn))
    if weight is None or heads is None or is_offloaded or not is_plain(weight) or weight.itemsize == 1:
        return None, None
    query = torch.empty(1, 1, 1, weight.shape[0] // heads, dtype=weight.dtype, device=weight.device)
    try:
        obstacle = why_not_kernels(config.implementation, query, Problem(TileGrid((1, 1, 1), (1, 1, 1)), 1, "", 1.0))
    except RuntimeError as error:
        return None, str(error)
    return ("triton", None) if obstacle is None else ("torch", obstacle[1])


def _title(transformer: TransformerStatus) -> str:
    return f"{transformer.name}: {transformer.model} ({transformer.family})"


def _html_rows(transformer: TransformerStatus) -> str:
    style = 'style="text-align: left"'
    return "".join(
        f"<tr><th {style}>{html.escape(label)}</th><td {style}>{html.escape(text)}</td></tr>"
        for label, text in transformer.rows()
    )


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
