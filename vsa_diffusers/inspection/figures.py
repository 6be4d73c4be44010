"""What an inspection found, drawn. Every function returns a `matplotlib.figure.Figure`."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .observation import CURVE_RATIOS, ENOUGH_MASS, Layer, Observation
from .result import Inspection

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_LAYERS = 6
MOST_FRAMES = 6
DIMMED = 0.22
"""Brightness of what no head keeps."""
_WIDTH = 5.2
"""Inches; on a telephone such a figure is still legible."""
_ROW_INCHES = 0.28
_TITLE_INCHES = 4.2
"""What a title needs, where there are few frames."""
_ACCENT = "#c2410c"
_QUERY = "#fb923c"


def draw_table(inspection: Inspection, what: str) -> Figure:
    """A number of each layer and step as a map: "mass" (of the kept tiles) or "error" (of the layer's output)."""
    title, colors, limit = _TABLES[what]
    table = inspection.table(what)
    figure = new_figure(_WIDTH, 1.2 + _ROW_INCHES * len(table))
    axis = figure.subplots()
    top = max(float(np.nanmax(table)), 1e-9) if limit is None else limit
    image = axis.imshow(table, aspect="auto", cmap=colors, vmin=0, vmax=top)
    axis.set_xticks(range(len(inspection.steps)), list(map(str, inspection.steps)))
    axis.set_xlabel("denoising step")
    _name_layers(axis, inspection)
    axis.set_title(title, fontsize=10, loc="left")
    bright = np.asarray(image.cmap(image.norm(table)))[..., :3] @ np.array([0.299, 0.587, 0.114]) > 0.55
    for (row, column), value in np.ndenumerate(table):
        if math.isfinite(value):
            color = "black" if bright[row, column] else "white"
            axis.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=9, color=color)
    figure.colorbar(image, ax=axis, fraction=0.04, pad=0.02)
    return figure


def draw_sharpness(inspection: Inspection) -> Figure:
    """The share of the tiles that each layer needs for 90 % of its mass: chosen by mass, and by the selection."""
    best, selected = inspection.by_layer("needed"), inspection.by_layer("needed_by_selection")
    ratio = _kept_share(inspection)
    figure = new_figure(_WIDTH, 1.9 + _ROW_INCHES * len(best))
    axis = figure.subplots()
    rows = np.arange(len(best))
    axis.hlines(rows, best, selected, color="#9ca3af", lw=3)
    axis.plot(best, rows, "o", color="#1d4ed8", label="those with most mass", ms=6)
    axis.plot(selected, rows, "o", color=_ACCENT, label="as the selection ranks them", ms=6)
    axis.axvline(ratio, color="black", ls="--", lw=1, label=f"kept: {ratio:.3g} of the tiles")
    axis.set_xlim(0, max(1.05 * float(selected.max()), 1.15 * ratio))
    axis.set_ylim(len(best) - 0.5, -0.5)
    _name_layers(axis, inspection)
    axis.set_xlabel(f"share of the tiles that holds {ENOUGH_MASS:.0%} of the mass")
    axis.set_title("How sharp each layer is: further left is sharper", fontsize=10, loc="left")
    axis.grid(axis="x", color="#e5e7eb")
    axis.set_axisbelow(True)
    figure.legend(loc="outside lower left", fontsize=9, ncols=2, frameon=False)
    return figure


def draw_curves(inspection: Inspection) -> Figure:
    """The mass that tiles kept by the selection hold, at every ratio, a line a layer."""
    import matplotlib

    figure = new_figure(_WIDTH, 3.8)
    axis = figure.subplots()
    curves, layers = inspection.by_layer("curve"), inspection.layers
    colors = matplotlib.colormaps["viridis"](np.linspace(0, 0.92, len(layers)))
    marked = inspection.dense_layers
    for curve, layer, color in zip(curves, layers, colors, strict=True):
        axis.plot(
            CURVE_RATIOS, curve, color=_ACCENT if layer in marked else color, lw=2.4 if layer in marked else 1.4,
            label=_short(layer, inspection) if len(layers) <= 2 * MOST_LAYERS or layer in marked else None,
        )  # fmt: skip
    ratio = _kept_share(inspection)
    axis.axvline(ratio, color="black", ls="--", lw=1)
    axis.axhline(ENOUGH_MASS, color="#9ca3af", ls=":", lw=1)
    axis.set_xlim(0, 1)
    axis.set_ylim(0, 1.02)
    axis.set_xlabel("share of the key tiles kept")
    axis.set_ylabel("attention mass held")
    axis.set_title("What other ratios would hold", fontsize=10, loc="left")
    axis.grid(color="#e5e7eb")
    if len(layers) > 2 * MOST_LAYERS:
        scale = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(0, len(layers) - 1), "viridis")
        figure.colorbar(scale, ax=axis, label="layer", fraction=0.04, pad=0.02)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=9, ncols=2, loc="lower right")
    return figure


def draw_query(
    inspection: Inspection, layers: Sequence[int] | None = None, step: int | None = None, what: str = "kept"
) -> Figure:
    """Where the chosen query looks, over frames of the video: a row a layer, a column for tiles of one time.

    Args:
        inspection: with frames, or without: then over plain grey.
        layers: places in `inspection.layers`; `None` draws at most six, those that ask to stay dense among them.
        step: a measured step; `None` takes the one in the middle.
        what: "kept": tiles are as bright as the share of the heads that keep them. "mass": as the square root of their
            share of dense attention's mass, the largest being white.

    Raises:
        ValueError: nothing was recorded of the query there.
    """
    drawn = _drawn(inspection, layers, step)
    first = drawn[0]
    n_t = first.grid.tiles_per_axis[0]
    columns = np.unique(np.linspace(0, n_t - 1, min(MOST_FRAMES, n_t)).round().astype(int))
    query_column = _place(first)[0]
    if query_column not in columns:
        columns[np.abs(columns - query_column).argmin()] = query_column
    frames = {each: _frame(inspection, first, each) for each in columns}
    height, width, _ = frames[columns[0]][1].shape
    side = min(1.7, 7.6 / len(columns))
    figure = new_figure(max(len(columns) * side + 0.8, _TITLE_INCHES), len(drawn) * side * height / width + 0.8)
    axes = figure.subplots(len(drawn), len(columns), squeeze=False)
    for row, each in zip(axes, drawn, strict=True):
        row[0].set_ylabel(f"{_short(each.layer, inspection)}\nholds {each.mass:.0%}", fontsize=8)
        for axis, column in zip(row, columns, strict=True):
            number, frame = frames[column]
            _draw_tiles(axis, frame, each, column, what)
            if each is first:
                axis.set_title("" if number is None else f"frame {number}", fontsize=8)
    brightness = "share of the heads that keep a tile" if what == "kept" else "mass in a tile"
    figure.suptitle(f"step {first.step}, brightness: {brightness}", fontsize=9)
    return figure


def png(figure: Figure) -> bytes:
    """A figure as the content of a PNG file."""
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


_TABLES: dict[str, tuple[str, str, float | None]] = {
    "mass": ("Attention mass on what is attended exactly", "viridis", 1.0),
    "error": ("Error of the layer's output, sparse against dense", "inferno", None),
}


def _drawn(inspection: Inspection, layers: Sequence[int] | None, step: int | None) -> list[Observation]:
    """One observation a layer, of the step's first run."""
    all_layers, steps = inspection.layers, inspection.steps
    step = steps[len(steps) // 2] if step is None else step
    of_layer: dict[Layer, Observation] = {}
    for each in inspection.observations:
        if each.query is not None and each.step == step:
            of_layer.setdefault(each.layer, each)
    if layers is None:
        marked = [all_layers.index(layer) for layer in inspection.dense_layers][: MOST_LAYERS // 2]
        spread = np.linspace(0, len(all_layers) - 1, min(len(all_layers), MOST_LAYERS)).round().astype(int).tolist()
        surplus = [place for place in spread if place not in marked]
        layers = sorted(marked + surplus[: MOST_LAYERS - len(marked)])
    drawn = [of_layer[all_layers[place]] for place in layers if all_layers[place] in of_layer]
    if not drawn:
        raise ValueError(f"step={step} and layers={layers}: nothing was recorded of the query there.")
    return [each for each in drawn if each.grid == drawn[0].grid]


def _frame(inspection: Inspection, each: Observation, slab: int) -> tuple[int | None, np.ndarray]:
    """The frame in the middle of the tiles of one time, and its number; grey if there are no frames."""
    frames, extent, block = inspection.frames, each.grid.video_shape[0], each.grid.block_size[0]
    if frames is None:
        _, height, width = each.grid.video_shape
        return None, np.full((8 * height, 8 * width, 3), 190, dtype=np.uint8)
    middle = (slab * block + min(extent, (slab + 1) * block) - 1) / 2
    number = round(middle / max(1, extent - 1) * (len(frames) - 1))
    return number, frames[number]


def _draw_tiles(axis: Any, frame: np.ndarray, each: Observation, slab: int, what: str) -> None:
    """One frame, dimmed by tiles, with the tiles' edges."""
    import matplotlib.patches

    assert each.query is not None
    share = (each.query.kept if what == "kept" else (each.query.mass / each.query.mass.max()).sqrt()).numpy()
    share = share.reshape(each.grid.tiles_per_axis)[slab]
    height, width, _ = frame.shape
    edges = [_edges(extent, *sizes) for extent, sizes in zip((height, width), _sizes(each), strict=True)]
    rows, columns = (
        np.searchsorted(lines, np.arange(extent), "right") - 1
        for lines, extent in zip(edges, (height, width), strict=True)
    )
    light = DIMMED + (1 - DIMMED) * share[rows][:, columns, None]
    axis.imshow((frame * light).astype(np.uint8))
    for line in edges[0][1:-1]:
        axis.axhline(line - 0.5, color="white", lw=0.3, alpha=0.5)
    for line in edges[1][1:-1]:
        axis.axvline(line - 0.5, color="white", lw=0.3, alpha=0.5)
    t, h, w = _place(each)
    if t == slab:
        left, top = edges[1][w], edges[0][h]
        size = edges[1][w + 1] - left, edges[0][h + 1] - top
        axis.add_patch(matplotlib.patches.Rectangle((left - 0.5, top - 0.5), *size, fill=False, ec=_QUERY, lw=2))
    axis.set_xticks([])
    axis.set_yticks([])


def _sizes(each: Observation) -> list[tuple[int, int]]:
    """Tokens and tokens a block along h and w."""
    return list(zip(each.grid.video_shape[1:], each.grid.block_size[1:], strict=True))


def _edges(pixels: int, tokens: int, block: int) -> np.ndarray:
    """Where tiles begin along an axis, in pixels, and where the last one ends."""
    starts = [*range(0, tokens, block), tokens]
    return np.array([round(start / tokens * pixels) for start in starts])


def _place(each: Observation) -> tuple[int, int, int]:
    """The query tile's place among the tiles."""
    assert each.query is not None
    t, h, w = np.unravel_index(each.query.tile, each.grid.tiles_per_axis)
    return int(t), int(h), int(w)


def _kept_share(inspection: Inspection) -> float:
    return float(np.mean([each.kept / each.grid.num_tiles for each in inspection.observations]))


def _name_layers(axis: Any, inspection: Inspection) -> None:
    layers = inspection.layers
    axis.set_yticks(range(len(layers)), [_short(layer, inspection) for layer in layers], fontsize=9)
    for label, layer in zip(axis.get_yticklabels(), layers, strict=True):
        if layer in inspection.dense_layers:
            label.set_color(_ACCENT)
            label.set_fontweight("bold")


def _short(layer: Layer, inspection: Inspection) -> str:
    one = len({each.part for each in inspection.layers}) == 1
    return f"layer {layer.position}" if one else f"{layer.part} {layer.position}"


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches."""
    from matplotlib.figure import Figure

    class Drawing(Figure):
        """A figure that notebooks show, whether or not they use pyplot."""

        def _repr_png_(self) -> bytes:
            return png(self)

    return Drawing((width, height), dpi=110, layout="constrained")
