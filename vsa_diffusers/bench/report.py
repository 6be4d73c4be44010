"""Results as a table, a sentence and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

# By column: its name in a row, how it is printed, and what it means.
COLUMNS = {
    "what": ("what", "{}", ""),
    "ratio": ("ratio", "{:g}", "share of key tiles kept"),
    "ms": ("ms", "{:.3f}", "median of the rounds"),
    "x dense": ("speedup", "{:.2f}", "times as fast as the fastest dense"),
    "± %": ("spread", "{:.0%}", "from the shortest round to the longest, of ms"),
    "TFLOP/s": ("tflops", "{:.3g}", "of the products that the ratio asks for"),
    "extra MB": ("extra_bytes", "{:.0f}", "memory beyond what is returned"),
    "launches": ("launches", "{}", "kernels that are started"),
    "CPU us": ("cpu_us", "{:.0f}", "for the host to start them"),
    "differs": ("difference", "{:.2g}", "how far a peer's output is from ours (from PyTorch's if dense), of its norm"),
    "first ms": ("first_ms", "{:.0f}", "the first call, with what it had to compile"),
}


def cells(row: dict[str, Any]) -> dict[str, str]:
    """One result by column; what was not measured is empty."""
    values = dict(row)
    if row.get("extra_bytes") is not None:
        values["extra_bytes"] = row["extra_bytes"] / 1e6
    found = {column: (values.get(name), form) for column, (name, form, _) in COLUMNS.items()}
    return {column: "" if value is None else form.format(value) for column, (value, form) in found.items()}


def table(rows: Sequence[dict[str, Any]], title: str) -> Table:
    """The results of one shape; columns that nothing was measured for are left out."""
    lines = [cells(row) for row in rows]
    columns = [column for column in COLUMNS if any(line[column] for line in lines)]
    found = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1),
                  pad_edge=False)  # fmt: skip
    for column in columns:
        words = column == "what"
        found.add_column(column, justify="left" if words else "right", no_wrap=words, vertical="bottom")
    for row, line in zip(rows, lines, strict=True):
        if "skipped" not in row:
            found.add_row(*(line[column] for column in columns))
    return found


def skipped(rows: Sequence[dict[str, Any]]) -> Table:
    """What could not run, and why; the same reason once for all ratios."""
    found = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for column in ("skipped", "ratios", "because"):
        found.add_column(column)
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if "skipped" in row:
            reasons.setdefault((row["what"], row["skipped"]), []).append(cells(row)["ratio"])
    for (what, reason), ratios in reasons.items():
        found.add_row(what, " ".join(ratios), reason)
    return found


def legend(rows: Sequence[dict[str, Any]]) -> str:
    """What the columns mean that these rows fill."""
    filled = {column for row in rows for column, cell in cells(row).items() if cell}
    return "; ".join(
        f"{column}: {meaning}" for column, (_, _, meaning) in COLUMNS.items() if meaning and column in filled
    )


def verdict(rows: Sequence[dict[str, Any]]) -> str:
    """What the results of one shape come to, without those of peers, in a sentence."""
    timed = [row for row in rows if "skipped" not in row and "peer" not in row]
    dense = [row for row in timed if row["ratio"] is None]
    sparse = [row for row in timed if row["ratio"] is not None]
    if not dense or not sparse:
        return "There is nothing to compare: " + ("no sparse" if dense else "no dense") + " attention ran."
    fastest = min(dense, key=lambda row: row["ms"])
    best = min(sparse, key=lambda row: row["ms"])
    least = f"{fastest['what']} ({fastest['ms']:.3g} ms)"
    if best["speedup"] <= 1:
        return (
            f"Nothing is faster than {least} here; {best['what']} at {best['ratio']:g} comes nearest, at "
            f"{best['speedup']:.2f} times its speed."
        )
    slower = sum(row["speedup"] <= 1 for row in sparse)
    rest = f", and {slower} of {len(sparse)} settings are not faster" if slower else ", and all settings are faster"
    return f"{best['what']} at {best['ratio']:g} is {best['speedup']:.2f} times as fast as {least}{rest}."


def print_lines(columns: Sequence[str], lines: Sequence[Sequence[str]], title: str, left: int) -> None:
    """A wide table; the first `left` columns are words."""
    found = Table(title=title)
    for position, column in enumerate(columns):
        found.add_column(column, justify="left" if position < left else "right", no_wrap=True)
    for line in lines:
        found.add_row(*line)
    Console(width=140).print(found)


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Speed-up over the fastest dense attention against the ratio, one panel for each shape."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    figure, axes = plt.subplots(1, len(shapes), figsize=(4 * len(shapes), 3.5), squeeze=False)
    for axis, shape in zip(axes[0], shapes, strict=True):
        timed = [row for row in rows if row["shape"] == shape and "skipped" not in row]
        sparse = [row for row in timed if row["ratio"] is not None]
        for what in dict.fromkeys(row["what"] for row in sparse):
            points = sorted((row["ratio"], row["speedup"]) for row in sparse if row["what"] == what)
            axis.plot(*zip(*points, strict=True), marker="o", label=what)
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.set(title=shape, xlabel="top_k_ratio", ylabel="times dense")
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)
