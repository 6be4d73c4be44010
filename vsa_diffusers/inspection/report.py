"""An inspection as files: pictures, numbers, a table for a terminal, and one page of HTML that holds all it shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from ..config import VSAConfig
from ..extras import check_installed
from ..files import PathLike, replaced_file
from ..pages import data_uri, render
from . import figures
from .result import RULE, Inspection

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PACKAGES = ("matplotlib", "jinja2")
NUMBERS, PAGE = "inspection.json", "report.html"
HEADINGS = ("layer", "mass held", "at best", "error", "worst error", "tiles for 90 %", "stay dense")
_SPARSE = ("top_k_ratio", "top_k", "block_size", "combine", "selection")


def write_inspection(inspection: Inspection, directory: PathLike, command: str | None = None) -> list[Path]:
    """Write `inspection.json`, `report.html` and the pictures into a directory, which is made if need be.

    All is ready before the first file is written, and each is written whole or not at all.

    Args:
        inspection: what was found.
        directory: files of the same names are replaced, others stay.
        command: what the page says that it was made with.

    Returns:
        The paths.

    Raises:
        ImportError: a package of the extra `report` is missing.
        OSError: a file cannot be written.
    """
    check_installed(*PACKAGES)
    pictures = {f"{name}.png": figures.png(figure) for name, figure in _figures(inspection).items()}
    files = {NUMBERS: (json.dumps(inspection.to_dict(), indent=1) + "\n").encode()}
    files |= {PAGE: html(inspection, pictures, command).encode(), **pictures}
    Path(directory).mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        with replaced_file(Path(directory) / name) as partial:
            partial.write_bytes(content)
    return [Path(directory) / name for name in files]


def html(inspection: Inspection, pictures: dict[str, bytes], command: str | None = None) -> str:
    """The page, with pictures by their names inside of it."""
    numbers = inspection.to_dict()
    grids = sorted({(each.grid.video_shape, each.grid.block_size, each.kept) for each in inspection.observations})
    given = {name: numbers["config"][name] for name in _SPARSE}
    count = "top_k_ratio" if inspection.config.top_k is None else "top_k"
    config = {name: value for name, value in given.items() if name == count or value != getattr(VSAConfig, name)}
    return render(
        "inspection/report.html.jinja",
        inspection=inspection,
        mass=f"{inspection.by_layer('mass').mean():.0%}",
        error=f"{np.median(inspection.by_layer('error')):.1%}",
        kept=_kept(inspection),
        headings=HEADINGS,
        rows=rows(inspection),
        rule=RULE,
        threshold=f"{inspection.threshold:.1%}",
        positions=tuple(sorted({layer.position for layer in inspection.dense_layers})),
        pictures={Path(name).stem: data_uri(content, "image/png") for name, content in pictures.items()},
        config=config,
        call={name: value for name, value in numbers["call"].items() if value != ""},
        settled=sorted({f"{each.combine} by {each.selection}" for each in inspection.observations}),
        grids=[
            f"{'x'.join(map(str, shape))} tokens, blocks of {'x'.join(map(str, block))}, {kept} tiles kept"
            for shape, block, kept in grids
        ],
        runs=len(inspection.observations),
        versions=numbers["versions"],
        command=command,
    )


def rows(inspection: Inspection) -> list[tuple[str, ...]]:
    """Cells under `HEADINGS`, a row a layer."""
    several = len({layer.part for layer in inspection.layers}) > 1
    values = [inspection.by_layer(what) for what in ("mass", "best_mass", "error")]
    columns = [*values, inspection.worst_error, inspection.by_layer("needed_by_selection")]
    marked = inspection.dense_layers
    cells = []
    for place, layer in enumerate(inspection.layers):
        name = f"{layer.part} {layer.position}" if several else str(layer.position)
        numbers = (f"{column[place]:.0%}" if column is not values[2] else f"{column[place]:.1%}" for column in columns)
        cells.append((name, *numbers, "asks" if layer in marked else ""))
    return cells


def table(inspection: Inspection) -> Table:
    """For a terminal."""
    shown = Table(title=f"{_kept(inspection)}; error: sparse against dense")
    for heading in HEADINGS:
        shown.add_column(heading, justify="right")
    for row in rows(inspection):
        shown.add_row(*row)
    return shown


def _kept(inspection: Inspection) -> str:
    counts = sorted({(each.kept, each.grid.num_tiles) for each in inspection.observations})
    return ", ".join(f"{kept} of {tiles}" for kept, tiles in counts) + " tiles kept"


def _figures(inspection: Inspection) -> dict[str, Figure]:
    drawn: dict[str, Any] = {
        "mass": figures.draw_table(inspection, "mass"),
        "error": figures.draw_table(inspection, "error"),
        "sharpness": figures.draw_sharpness(inspection),
        "curves": figures.draw_curves(inspection),
    }
    if any(each.query is not None for each in inspection.observations):
        drawn["query"] = figures.draw_query(inspection)
    return drawn
