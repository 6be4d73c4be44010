"""A comparison as tables, and as one page of HTML that holds its videos."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from ..config import VSAConfig
from ..files import PathLike
from ..pages import data_uri, render, write_page
from .pictures import difference, difference_picture, frame_picture, picked_frames
from .settings import Setting

if TYPE_CHECKING:
    from .api import Comparison, Result

HEADINGS = ("setting", "times dense", "denoising, s", "whole call, s", "memory, GiB", "PSNR, dB", "SSIM", "LPIPS")
_COLOURS = 6  # series that the base template has
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 480, 280, 56, 16, 16, 44


def columns(comparison: Comparison) -> dict[str, list[str]]:
    """Cells by heading, a cell per setting: means and standard deviations over the prompts.

    What is known of no setting, such as memory without a GPU, is left out.
    """
    cells = [_row(comparison, result) for result in comparison.results]
    by_heading = dict(zip(HEADINGS, map(list, zip(*cells, strict=True)), strict=True))
    return {heading: column for heading, column in by_heading.items() if any(column)}


def table(comparison: Comparison) -> Table:
    """For a terminal."""
    shown, cells = Table(), columns(comparison)
    for heading in cells:
        shown.add_column(heading, justify="left" if heading == HEADINGS[0] else "right")
    for row in zip(*cells.values(), strict=True):
        shown.add_row(*row)
    return shown


def html_table(comparison: Comparison) -> str:
    """For a notebook."""
    return render("comparison/table.html.jinja", **_table(comparison))


def _table(comparison: Comparison) -> dict[str, Any]:
    cells = columns(comparison)
    return {"headings": list(cells), "rows": list(zip(*cells.values(), strict=True))}


def write_report(path: PathLike, comparison: Comparison) -> None:
    """Write the page, whole or not at all."""
    prompts = [_prompt(comparison, index) for index in range(len(comparison.prompts))]
    shown = comparison.to_dict()
    write_page(
        path,
        "comparison/report.html.jinja",
        model=comparison.facts["model"],
        verdicts=[_verdict(comparison, result) for result in comparison.results[1:]],
        hint=comparison.hint,
        **_table(comparison),
        several=len(prompts) > 1,
        no_distance=comparison.no_distance,
        no_memory=comparison.results[0].mean("peak_memory") is None,
        prompts=prompts,
        has_sound=any(made.video.audio is not None for result in comparison.results for made in result.made),
        curve=_curve(comparison),
        settings=[(result.setting.name, _in_words(result.setting)) for result in comparison.results],
        facts={name: shown[name] for name in ("model", "pipeline", "dtype", "hardware", "seed")},
        arguments={name: value for name, value in shown["arguments"].items() if value not in ("", None)},
        versions=shown["versions"],
        reused=any(any(result.reused) for result in comparison.results),
        command=comparison.command,
    )


def _row(comparison: Comparison, result: Result) -> list[str]:
    memory = result.mean("peak_memory")
    cells = [
        result.setting.name,
        f"{comparison.speedup(result):.2f}x",
        _number(result, "denoising", ".1f"),
        _number(result, "seconds", ".1f"),
        "" if memory is None else f"{memory / 2**30:.2f}",
    ]
    if not result.close:
        return [*cells, "", "", ""]
    psnr = "identical" if math.isinf(result.mean("psnr") or 0) else _number(result, "psnr", ".1f")
    distance = "" if comparison.no_distance else _number(result, "distance", ".3f")
    return [*cells, psnr, _number(result, "ssim", ".3f"), distance]


def _number(result: Result, name: str, form: str) -> str:
    mean, spread = result.mean(name), result.spread(name)
    if mean is None or math.isnan(mean):
        return ""
    return f"{mean:{form}}" if spread is None else f"{mean:{form}} ± {spread:{form}}"


def _verdict(comparison: Comparison, result: Result) -> dict[str, str]:
    cells = dict(zip(HEADINGS, _row(comparison, result), strict=True))
    psnr = cells["PSNR, dB"]
    closeness = "the same video" if psnr == "identical" else f"PSNR {psnr} dB, SSIM {cells['SSIM']}"
    return {"name": result.setting.name, "speedup": cells["times dense"].rstrip("x"), "closeness": closeness}


def _prompt(comparison: Comparison, index: int) -> dict[str, Any]:
    """What the page shows of one prompt: videos, and frames that differ."""
    dense = comparison.results[0].made[index].video
    picks = picked_frames(len(dense.frames))
    differences = [
        np.percentile(difference(result.made[index].video.frames[pick], dense.frames[pick]), 99.5)
        for result in comparison.results[1:]
        for pick in picks
    ]
    largest = max(float(max(differences)), 1 / 255)
    return {
        "text": comparison.prompts[index],
        "videos": [
            {
                "name": result.setting.name,
                "source": data_uri(comparison.directory / result.files[index], "video/mp4"),
                "note": _note(comparison, result, index),
            }
            for result in comparison.results
        ],
        "fps": dense.fps,
        "frames": len(dense.frames),
        "height": dense.frames.shape[1],
        "width": dense.frames.shape[2],
        "picks": picks,
        "largest": f"{largest:.0%}",
        "dense": [data_uri(frame_picture(dense.frames[pick]), "image/jpeg") for pick in picks],
        "differences": [
            (
                result.setting.name,
                [
                    data_uri(
                        difference_picture(result.made[index].video.frames[pick], dense.frames[pick], largest),
                        "image/jpeg",
                    )
                    for pick in picks
                ],
            )
            for result in comparison.results[1:]
        ],
    }


def _note(comparison: Comparison, result: Result, index: int) -> str:
    seconds = f"{result.made[index].denoising:.1f} s"
    if not result.close:
        return seconds
    psnr = result.close[index].psnr
    return f"{seconds}, {'identical' if math.isinf(psnr) else f'{psnr:.1f} dB'}"


def _in_words(setting: Setting) -> str:
    """The fields of a config that are not at their defaults, or its patterns."""
    if setting.config is None:
        return "every layer and step dense"
    if not isinstance(setting.config, VSAConfig):
        return json.dumps(setting.to_dict())
    usual = VSAConfig().to_dict()
    given = {name: value for name, value in setting.config.to_dict().items() if value != usual[name]}
    count = {} if setting.config.top_k is not None else {"top_k_ratio": setting.config.top_k_ratio}
    return ", ".join(f"{name} = {json.dumps(value)}" for name, value in (count | given).items())


def _curve(comparison: Comparison) -> dict[str, Any] | None:
    """Points and axes of closeness against time, in pixels of the figure; `None` where no point can be drawn."""
    from matplotlib.ticker import MaxNLocator

    dense = comparison.results[0].mean("denoising") or math.nan
    points = [
        (result.setting.name, result.mean("denoising") or math.nan, result.mean("psnr") or math.nan, index)
        for index, result in enumerate(comparison.results[1:], start=1)
    ]
    points = [point for point in points if math.isfinite(point[1]) and math.isfinite(point[2])]
    if not points or not math.isfinite(dense):
        return None
    seconds, psnr = [dense, *(point[1] for point in points)], [point[2] for point in points]
    right, low, high = max(seconds) * 1.05, min(psnr) - 1, max(psnr) + 1
    wide, tall = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def x(value: float) -> float:
        return round(_LEFT + wide * value / right, 1)

    def y(value: float) -> float:
        return round(_TOP + tall * (high - value) / (high - low), 1)

    def ticks(first: float, last: float) -> Sequence[float]:
        return [float(each) for each in MaxNLocator(6).tick_values(first, last) if first <= each <= last]

    drawn = [
        {
            "name": name, "x": x(time), "y": y(value), "colour": (index - 1) % (_COLOURS - 1) + 1,
            "label": f"{name}: {time:.1f} s, {value:.1f} dB", "is_left": x(time) > _WIDTH * 0.6,
        }
        for name, time, value, index in points
    ]  # fmt: skip
    return {
        "width": _WIDTH, "height": _HEIGHT, "left": _LEFT, "right": _WIDTH - _RIGHT, "top": _TOP,
        "bottom": _HEIGHT - _BOTTOM, "dense": x(dense), "points": drawn,
        "x_ticks": [(x(each), f"{each:g}") for each in ticks(0, right)],
        "y_ticks": [(y(each), f"{each:g}") for each in ticks(low, high)],
    }  # fmt: skip
