"""Frames of several videos as one picture, and where they differ."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np

from ..files import PathLike, replaced_file

PICKS = 6


def picked_frames(count: int, picks: int = PICKS) -> list[int]:
    """Numbers of a few frames, from the first to the last."""
    return sorted({round(each) for each in np.linspace(0, count - 1, picks)})


def write_contact_sheet(path: PathLike, rows: Sequence[tuple[str, np.ndarray]], title: str) -> None:
    """A few frames of each video as a PNG, one row per video.

    Args:
        path: the file.
        rows: label and frames `[frames, height, width, 3]`, uint8, of each video.
        title: above them.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    picks = picked_frames(len(rows[0][1]))
    _, height, width, _ = rows[0][1].shape
    figure = Figure(figsize=(12, (12 / PICKS * height / width + 0.15) * len(rows) + 0.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), len(picks), squeeze=False)
    for row, (label, frames) in zip(axes, rows, strict=True):
        for axis, pick in zip(row, picks, strict=True):
            axis.imshow(frames[pick])
            axis.set_xticks([])
            axis.set_yticks([])
            if label == rows[0][0]:
                axis.set_title(f"frame {pick + 1}", fontsize=9)
        row[0].set_ylabel(label, fontsize=10)
    figure.suptitle(title, wrap=True)
    with replaced_file(path) as partial:
        figure.savefig(partial, dpi=110, format="png")


def frame_picture(frame: np.ndarray, width: int = 320) -> bytes:
    """One frame `[height, width, 3]`, uint8, as a JPEG of at most that width."""
    from PIL import Image

    picture = Image.fromarray(frame)
    picture.thumbnail((width, width * 4))
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=85)
    return content.getvalue()


def difference(frame: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """`[height, width]` in 0 to 1: by how much each pixel differs, the mean over its colours."""
    return np.abs(frame.astype(np.float32) - reference.astype(np.float32)).mean(axis=2) / 255


def difference_picture(frame: np.ndarray, reference: np.ndarray, largest: float) -> bytes:
    """Where a frame differs from the reference's, as a JPEG: black where not, bright from `largest` on."""
    import matplotlib

    colours = matplotlib.colormaps["inferno"](difference(frame, reference) / max(largest, 1e-6))
    return frame_picture((colours[..., :3] * 255).round().astype(np.uint8))
