"""Draw the figures of concepts.md into `docs/images`: `python docs/make_figures.py`.

Tiles and branches are diagrams. Scores and kept tiles are those of one layer of the tiny Wan model in `examples`, which
makes a short video for them: about a minute on two cores. The extra `report` is needed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import matplotlib as mpl
import numpy as np
import torch
from diffusers import WanPipeline
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from vsa_diffusers import enable_vsa, video_sparse_attention
from vsa_diffusers.tiles import TileGrid, num_selected_tiles

MODEL = Path(__file__).parents[1] / "examples" / "tiny_wan"
IMAGES = Path(__file__).parent / "images"
STEPS, STEP, LAYER, HEAD, RATIO = 8, 4, 4, 0, 0.2
WIDTH = 4.8  # inches, which a phone shows nearly whole
INK = "#6e7780"  # drawn with this, shown in the color of the scheme
SCHEMES = "<style>svg{color:#444b54}@media(prefers-color-scheme:dark){svg{color:#c5cad3}}</style>"
TILE_COLORS = ("#4f6bed", "#e0812b", "#2f9e6e", "#c2447f", "#8a63d2", "#b59410")
QUERY, KEPT = "#e0812b", "#4f6bed"
mpl.rcParams.update({
    "svg.fonttype": "none", "svg.hashsalt": "vsa_diffusers", "font.size": 9.5, "text.color": INK,
    "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.titlesize": 9.5,
})  # fmt: skip


def tiles() -> Figure:
    """Four frames of a grid, cut into six tiles, and what becomes of one."""
    figure, axis = _canvas(WIDTH, 2.3, (0, 20.6), (0, 11.6))
    frames, height, width, block = 4, 8, 12, 4
    for frame in reversed(range(frames)):
        x, y = 0.2 + 0.75 * frame, 0.3 + 0.75 * frame
        for row, column in np.ndindex(height, width):
            color = TILE_COLORS[row // block * (width // block) + column // block]
            axis.add_patch(Rectangle((x + column, y + row), 0.9, 0.9, fc=color, ec="none", alpha=0.6 if frame else 1))
    axis.text(6.2, 11.2, "(4, 8, 12) tokens, six tiles", ha="center", va="center")
    for frame in reversed(range(block)):
        for row, column in np.ndindex(block, block):
            place = (15.2 + 0.4 * frame + 0.62 * column, 4.6 + 0.4 * frame + 0.62 * row)
            axis.add_patch(Rectangle(place, 0.55, 0.55, fc=TILE_COLORS[2], ec="none", alpha=0.6 if frame else 1))
    axis.text(17.2, 9.4, "64 tokens", ha="center", va="center")
    _arrow(axis, (17, 4.2), (17, 2.7))
    axis.add_patch(Rectangle((16.4, 1.3), 1.2, 1.2, fc=TILE_COLORS[2], ec="none"))
    axis.text(17, 0.6, "one mean", ha="center", va="center")
    return figure


def branches() -> Figure:
    """What happens to a query tile, from tokens to its output."""
    figure, axis = _canvas(WIDTH, 4.5, (0, 10), (0, 9.4))
    _box(axis, 5, 8.8, 5.6, "query, key, value in tiles")
    _box(axis, 2.5, 7.1, 4.4, "means of the tiles")
    _box(axis, 2.5, 5.4, 4.4, "coarse scores,\ntile by tile")
    _box(axis, 7.5, 5.4, 4.4, "top_k best tiles\nof each query tile", KEPT)
    _box(axis, 2.5, 3.1, 4.4, "coarse branch:\nattention to means")
    _box(axis, 7.5, 3.1, 4.4, "sparse branch: exact\nattention to their tokens", KEPT)
    _box(axis, 5, 0.8, 6.4, "combine: gate, merge, ...", QUERY)
    for start, end in (
        ((3.4, 8.4), (2.5, 7.5)), ((2.5, 6.7), (2.5, 5.95)), ((4.75, 5.4), (5.25, 5.4)), ((2.5, 4.85), (2.5, 3.65)),
        ((7.5, 4.85), (7.5, 3.65)), ((2.5, 2.55), (3.8, 1.25)), ((7.5, 2.55), (6.2, 1.25)),
    ):  # fmt: skip
        _arrow(axis, start, end)
    axis.plot([7.8, 9.9, 9.9], [8.8, 8.8, 3.1], color=INK, lw=0.9, solid_joinstyle="miter")
    _arrow(axis, (9.95, 3.1), (9.7, 3.1))
    return figure


def scores(coarse: torch.Tensor, kept: torch.Tensor) -> Figure:
    """A real layer's coarse scores beside the tiles that are kept by them."""
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 2.6), layout="constrained")
    axes[0].imshow(coarse.sqrt(), cmap="viridis", interpolation="nearest")
    axes[1].imshow(kept, cmap=mpl.colors.ListedColormap(["#80808030", KEPT]), interpolation="nearest")
    for axis, title in zip(axes, ("coarse scores", f"kept at {RATIO}"), strict=True):
        axis.set(title=title, xlabel="key tile", xticks=(0, 32, 63), yticks=(0, 32, 63))
    axes[0].set_ylabel("query tile")
    return figure


def kept_tiles(frames: np.ndarray, grid: TileGrid, kept: torch.Tensor, query: int) -> Figure:
    """Which tiles one query tile keeps, over a frame of each of their times."""
    n_t, n_h, n_w = grid.tiles_per_axis
    figure, axes = plt.subplots(2, 2, figsize=(WIDTH * 0.8, WIDTH * 0.86), layout="constrained")
    shown = kept[query].reshape(n_t, n_h, n_w)
    for time, axis in enumerate(axes.flat):
        first, last = (round(place * len(frames) / n_t) for place in (time, time + 1))
        frame = frames[(first + last) // 2][::2, ::2]
        bright = np.kron(np.where(shown[time], 1.0, 0.25), np.ones([frame.shape[0] // n_h, frame.shape[1] // n_w]))
        axis.imshow((frame * bright[..., None] * 255).astype("uint8"), interpolation="nearest")
        axis.set(xticks=[], yticks=[], title=f"frames {first} to {last - 1}")
        own = query - time * n_h * n_w
        if 0 <= own < n_h * n_w:
            side = frame.shape[0] // n_h
            place = (own % n_w * side, own // n_w * side)
            axis.add_patch(Rectangle(place, side - 1, side - 1, fc="none", ec=QUERY, lw=2.5))
    return figure


def observe() -> tuple[torch.Tensor, torch.Tensor, TileGrid, np.ndarray]:
    """Query and key means `[tiles, head_dim]` of one layer, step and head, the grid, and the video's frames."""
    call = json.loads((MODEL / "recommended.json").read_text()) | {"num_inference_steps": STEPS, "output_type": "np"}
    pipe = WanPipeline.from_pretrained(MODEL)
    enable_vsa(pipe, top_k_ratio=1.0)  # dense, up to rounding
    calls = []

    def record(query, key, value, video_shape, **options):
        calls.append((query[0, :, HEAD].float(), key[0, :, HEAD].float(), tuple(video_shape)))
        return video_sparse_attention(query, key, value, video_shape, **options)

    with mock.patch("vsa_diffusers.processor.video_sparse_attention", record):
        frames = pipe(generator=torch.Generator().manual_seed(call.pop("seed")), **call).frames[0]
    layers, predictions = len(pipe.transformer.blocks), 2
    query, key, video_shape = calls[STEP * layers * predictions + LAYER]
    grid = TileGrid(video_shape, (4, 4, 4))
    order = grid.token_index()
    return query[order].mean(1), key[order].mean(1), grid, frames


def _canvas(width: float, height: float, x: tuple[float, float], y: tuple[float, float]) -> tuple[Figure, Axes]:
    figure = plt.figure(figsize=(width, height))
    axis = figure.add_axes((0, 0, 1, 1), xlim=x, ylim=y)
    axis.axis("off")
    return figure, axis


def _box(axis: Axes, x: float, y: float, width: float, text: str, color: str = INK) -> None:
    height = 0.8 if "\n" not in text else 1.1
    axis.add_patch(FancyBboxPatch((x - width / 2, y - height / 2), width, height, fc="none", ec=color, lw=1.5,
                                  boxstyle="round,pad=0,rounding_size=0.15"))  # fmt: skip
    axis.text(x, y, text, ha="center", va="center", linespacing=1.3)


def _arrow(axis: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axis.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": INK, "lw": 0.9, "shrinkA": 0, "shrinkB": 0})


def save(name: str, figure: Figure) -> None:
    """Write it without a background, its ink in the color of the scheme."""
    path = IMAGES / f"{name}.svg"
    figure.savefig(path, transparent=True, metadata={"Date": None, "Creator": None})
    text = path.read_text().replace(INK, "currentColor").replace("<defs>", f"{SCHEMES}<defs>", 1)
    path.write_text("\n".join(line.rstrip() for line in text.splitlines()) + "\n")
    plt.close(figure)


def main() -> None:
    """Draw all of them."""
    diagrams: dict[str, Callable[[], Figure]] = {"tiles": tiles, "branches": branches}
    for name, draw in diagrams.items():
        save(name, draw())
    query, key, grid, frames = observe()
    coarse = (query @ key.T * query.shape[-1] ** -0.5).softmax(-1)
    top = coarse.topk(num_selected_tiles(grid.num_tiles, RATIO)).indices
    kept = torch.zeros_like(coarse, dtype=torch.bool).scatter(1, top, True)
    save("scores", scores(coarse, kept))
    n_t, n_h, n_w = grid.tiles_per_axis
    save("kept_tiles", kept_tiles(frames, grid, kept, (n_t // 2 * n_h + n_h // 2) * n_w + n_w // 2))


if __name__ == "__main__":
    main()
