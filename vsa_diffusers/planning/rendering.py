"""A `Plan` as rich prints it, in 80 columns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from .plan import Plan

_COLOURS = {"too small": "red", "marginal": "yellow", "excellent": "green"}


def rendered(plan: Plan) -> Any:
    """Facts, speeds, recipes and advice below each other."""
    parts: list[Any] = [_title(plan), _facts(plan)]
    heading = f"\nTimes as fast as dense on {plan.device}; a dense layer takes {_short(plan.dense_ms)} ms"
    parts += [Text(heading, style="bold"), _speeds(plan), _origin(plan)]
    if plan.recipes:
        parts += [Text('\nRecipes: enable_vsa(pipe, recipe="balanced")', style="bold"), _recipes(plan)]
    verdict = Text.assemble((plan.kind.capitalize(), f"bold {_COLOURS[plan.kind]}"), f". {plan.advice[0]}")
    parts += [verdict, *(Text(f"- {sentence}") for sentence in plan.advice[1:])]
    parts += [Text(note, style="dim") for note in plan.notes]
    return Group(*parts)


def _title(plan: Plan) -> Text:
    height, width, frames = plan.size
    return Text.assemble((plan.model, "bold"), f"  {height}x{width}, {frames} frames")


def _facts(plan: Plan) -> Table:
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="cyan", no_wrap=True)
    facts.add_column()
    guidance = " (guidance in one batch)" if plan.batch > 1 else ""
    rows = {
        "family": f"{plan.family} ({plan.transformer}, {_parameters(plan.parameters)} parameters)",
        "latent grid": f"{_by(plan.latents)} (frames, height, width)",
        "tokens": f"{_by(plan.video_shape)} = {_spaced(plan.tokens)}",
        "tiles": f"{_by(plan.tiles_per_axis)} = {_spaced(plan.tiles)}, of {_by(plan.block)} tokens",
        "padding": f"{plan.padding:.0%} of the tiles' slots are empty; the tiles cost {plan.waste - 1:.0%} more than "
        "whole ones of 64 tokens",
        "layers": f"{plan.layers} of {plan.heads} heads of {plan.head_dim}, batch {plan.batch}{guidance}",
        "attention": f"{plan.attention_of_flops:.0%} of a dense forward's FLOPs, about {plan.attention_of_time:.0%} of "
        "its time (estimates)",
    }
    for name, value in rows.items():
        facts.add_row(name, value)
    return facts


def _speeds(plan: Plan) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("top_k_ratio", "tiles kept", "layer, ms", "layer", "whole model"):
        table.add_column(name, justify="right", no_wrap=True)
    for speed in plan.speeds:
        table.add_row(
            f"{speed.ratio:g}", _spaced(speed.kept_tiles), _short(speed.layer_ms), f"{speed.layer:.2f}x",
            f"{speed.model:.2f}x",
        )  # fmt: skip
    return table


def _origin(plan: Plan) -> Text:
    where = "" if plan.reach == "measured" else " from"
    return Text(f"Layer {plan.reach}{where}: {plan.origin}.", style="dim")


def _recipes(plan: Plan) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("recipe", "ratio", "dense steps", "dense layers", "denoising"):
        table.add_column(name, justify="left" if name == "recipe" else "right", no_wrap=True)
    for each in plan.recipes:
        steps = f"{each.dense_steps:.0%}" if isinstance(each.dense_steps, float) else str(each.dense_steps)
        table.add_row(each.name, f"{each.top_k_ratio:g}", f"first {steps}", ", ".join(map(str, each.dense_layers)),
                      f"{each.speedup:.2f}x")  # fmt: skip
    return table


def _short(number: float) -> str:
    """Three digits, and all of those before the point."""
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def _parameters(count: int) -> str:
    return f"{count / 1e9:.1f} billion" if count >= 1e8 else f"{count / 1e6:.1f} million"


def _by(extents: tuple[int, ...]) -> str:
    return "x".join(map(str, extents))


def _spaced(number: int) -> str:
    """A number in groups of three digits."""
    return f"{number:,}".replace(",", " ")
