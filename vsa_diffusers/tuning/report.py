"""A tuning as a table, and as one page of HTML that holds everything it shows."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from ..files import PathLike
from ..inspection.figures import new_figure, png
from ..pages import data_uri, write_page
from .result import DEFAULT, Point, Tuning, by_cost

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HEADINGS = ("setting", "cost", "tiles kept", "times dense", "PSNR, dB", "SSIM", "error", "")
_AXES = {"psnr": "PSNR to dense, dB", "ssim": "SSIM to dense"}
_COLOURS = ("#1d4ed8", "#c2410c", "#15803d", "#7e22ce", "#be123c", "#0e7490")
_WIDTH = 6.4
_ROW_INCHES = 0.26


def columns(tuning: Tuning) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Headings and rows, cheapest first, without columns that would be empty or say the same as another.

    The best setting says so in the last column.
    """
    cost = "{:.3f}" if tuning.cost.is_time else ""
    cells = [
        (
            each.name, cost.format(each.cost), f"{each.kept:.3f}", f"{each.speedup:.2f}x", _psnr(each),
            f"{each.ssim:.3f}", "" if each.error is None else f"{each.error:.3f}",
            ("best" if tuning.is_met else "nearest") if each.name == tuning.best.name else "",
        )
        for each in by_cost(tuning.points)
    ]  # fmt: skip
    last = len(HEADINGS) - 1
    shown = [place for place in range(last + 1) if place in (0, last) or any(row[place] for row in cells)]
    return tuple(HEADINGS[place] for place in shown), [tuple(row[place] for place in shown) for row in cells]


def table(tuning: Tuning) -> Table:
    """For a terminal."""
    headings, rows = columns(tuning)
    shown = Table()
    for place, heading in enumerate(headings):
        shown.add_column(heading, justify="left" if not place else "right", no_wrap=not place)
    for row in rows:
        shown.add_row(*row)
    return shown


def verdict(tuning: Tuning) -> str:
    """In a sentence or two, what was found."""
    best, default = tuning.best, tuning.default
    spent = f"{best.cost:.3f} of dense attention's time" if tuning.cost.is_time else f"{best.kept:.3f} of the tiles"
    reached = f"{spent}, {best.speedup:.2f} times as fast, PSNR {_psnr(best)} dB"
    if not tuning.is_met:
        return f"No setting that was tried reaches {tuning.target}; the nearest is {best.name}: {reached}."
    text = f"{best.name} reaches {tuning.target}: {reached}."
    if default is not None and default is not best and math.isfinite(best.psnr) and math.isfinite(default.psnr):
        cost = f", of cost {default.cost:.3f}," if tuning.cost.is_time else ""
        text += f" The default at top_k_ratio={default.kept:.3g}{cost} has a PSNR of {_psnr(default)} dB."
    if not all(each.proven for each in tuning.points):
        count = len(tuning.comparison.prompts)
        text += (
            f" What else was tried does not beat it by more than chance on {count} prompt{'s' if count > 1 else ''}."
        )
    return text


def write_report(path: PathLike, tuning: Tuning, *, has_videos: bool) -> None:
    """Write the page, whole or not at all; it says where the videos are if there are some."""
    numbers = tuning.to_dict()
    best = tuning.best
    headings, rows = columns(tuning)
    write_page(
        path,
        "tuning/report.html.jinja",
        model=numbers["model"],
        prompts=numbers["prompts"],
        target=str(tuning.target),
        verdict=verdict(tuning),
        is_met=tuning.is_met,
        best=best,
        psnr=_psnr(best),
        speed=f"{best.speedup:.2f}",
        headings=headings,
        rows=rows,
        has_videos=has_videos,
        cost=tuning.cost.reason,
        curve=data_uri(png(draw_curve(tuning)), "image/png"),
        ratios=data_uri(png(draw_ratios(tuning, best)), "image/png"),
        losses=data_uri(png(draw_losses(tuning)), "image/png"),
        config=json.dumps(best.config, indent=2),
        facts={name: numbers[name] for name in ("pipeline", "dtype", "hardware", "seed")}
        | {"block and selection": f"{tuning.probe.tiling.block}, {tuning.probe.tiling.selection}"},
        arguments={name: value for name, value in numbers["arguments"].items() if value not in ("", None)},
        versions=numbers["versions"],
        command=tuning.command,
    )


def draw_curve(tuning: Tuning) -> Figure:
    """Quality against cost of all settings, and the line of those that no other one beats."""
    name = tuning.target.chooses_by
    figure = new_figure(_WIDTH, 4.2)
    axis = figure.subplots()
    points = [each for each in tuning.points if math.isfinite(each.value(name))]
    frontier = [each for each in tuning.frontier if math.isfinite(each.value(name))]
    axis.plot([each.cost for each in frontier], [each.value(name) for each in frontier], color="#9ca3af", lw=1.5)
    tuned = list(dict.fromkeys(each.schedule for each in points if each.allocation is not None))
    for schedule in [*tuned, DEFAULT]:
        own = [each for each in by_cost(points) if each.schedule == schedule]
        is_default = schedule == DEFAULT
        colour = "#6b7280" if is_default else _COLOURS[tuned.index(schedule) % len(_COLOURS)]
        axis.plot(
            [each.cost for each in own], [each.value(name) for each in own], "x" if is_default else "o", color=colour,
            label="default" if is_default else schedule,
        )  # fmt: skip
    if math.isfinite(tuning.best.value(name)):
        axis.plot(tuning.best.cost, tuning.best.value(name), "o", ms=14, mfc="none", color="black")
    if tuning.target.name == name:
        axis.axhline(tuning.target.value, color="black", ls="--", lw=1)
    axis.set_xlabel("cost: time of attention over dense" if tuning.cost.is_time else "cost: share of the tiles kept")
    axis.set_ylabel(_AXES[name])
    axis.set_xlim(left=0)
    axis.grid(color="#e5e7eb")
    axis.set_axisbelow(True)
    figure.legend(loc="outside lower left", fontsize=9, ncols=3, frameon=False)
    return figure


def draw_ratios(tuning: Tuning, point: Point) -> Figure:
    """What a setting keeps, as a map of layers and steps."""
    return _draw_map(tuning, tuning.shares(point), range(tuning.probe.total), "Share of the tiles kept", 1.0)


def draw_losses(tuning: Tuning) -> Figure:
    """The error of the transformer's output that each layer alone makes at the reference ratio, by measured step."""
    from .probe import RATIOS, REFERENCE

    losses = tuning.probe.errors[..., RATIOS.index(REFERENCE)] * tuning.probe.gains
    title = f"Error of the transformer's output, one layer sparse at {REFERENCE:g}"
    return _draw_map(tuning, losses, tuning.probe.steps, title, None)


def _draw_map(tuning: Tuning, values: np.ndarray, steps: Any, title: str, top: float | None) -> Figure:
    figure = new_figure(_WIDTH, 1.4 + _ROW_INCHES * len(values))
    axis = figure.subplots()
    image = axis.imshow(values, aspect="auto", cmap="viridis", vmin=0, vmax=top or max(float(values.max()), 1e-9))
    some = range(0, len(steps), max(1, len(steps) // 10))
    axis.set_xticks(list(some), [str(steps[place]) for place in some])
    axis.set_xlabel("denoising step")
    axis.set_yticks(range(len(values)), list(tuning.probe.layers), fontsize=8)
    axis.set_title(title, fontsize=10, loc="left")
    figure.colorbar(image, ax=axis, fraction=0.04, pad=0.02)
    return figure


def _psnr(point: Point) -> str:
    return f"{point.psnr:.1f}" if math.isfinite(point.psnr) else "infinite"
