"""Results as a table and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

COLUMNS = ("shape", "what", "ratio", "ms", "spread", "TFLOP/s", "x dense", "extra MB", "launches", "CPU us", "first ms")


def cells(row: dict[str, Any]) -> list[str]:
    """One result as the table shows it; what was not measured stays empty."""
    formats = {"ratio": "{:g}", "ms": "{:.3f}", "spread": "{:.0%}", "tflops": "{:.3g}", "speedup": "{:.2f}"}
    formats |= dict.fromkeys(("extra_bytes", "cpu_us", "first_ms"), "{:.0f}")
    values = {**row, "extra_bytes": None if row["extra_bytes"] is None else row["extra_bytes"] / 1e6}
    names = ["shape", "what", "ratio", "ms", "spread", "tflops", "speedup"]
    names += ["extra_bytes", "launches", "cpu_us", "first_ms"]
    return ["" if values[name] is None else formats.get(name, "{}").format(values[name]) for name in names]


def print_table(rows: Sequence[dict[str, Any]], title: str) -> None:
    """The results of one shape."""
    print_lines(COLUMNS, [cells(row) for row in rows], title, left=2)


def print_lines(columns: Sequence[str], lines: Sequence[Sequence[str]], title: str, left: int) -> None:
    """A rich table where rich is installed, else aligned text; the first `left` columns are words."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(map(len, column)) for column in zip(columns, *lines, strict=True)]
        print(title)
        for line in [columns, *lines]:
            print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
        return
    table = Table(title=title)
    for position, column in enumerate(columns):
        table.add_column(column, justify="left" if position < left else "right", no_wrap=True)
    for line in lines:
        table.add_row(*line)
    Console(width=140).print(table)


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Speed-up over the fastest dense attention against the ratio, one panel for each shape."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    figure, axes = plt.subplots(1, len(shapes), figsize=(4 * len(shapes), 3.5), squeeze=False)
    for axis, shape in zip(axes[0], shapes, strict=True):
        sparse = [row for row in rows if row["shape"] == shape and row["ratio"] is not None]
        for what in dict.fromkeys(row["what"] for row in sparse):
            points = sorted((row["ratio"], row["speedup"]) for row in sparse if row["what"] == what)
            axis.plot(*zip(*points, strict=True), marker="o", label=what)
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.set(title=shape, xlabel="top_k_ratio", ylabel="times dense")
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)
