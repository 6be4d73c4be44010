"""The results of `vsa_evidence.py` as a table and a plot."""

from __future__ import annotations

import statistics
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

LABELS = {
    ("sparse", False): "sparse, no training",
    ("merge", False): "merge, no training",
    ("merge_quarters", False): "merge by quarters, no training",
    ("dense", True): "merge, after dense training",
    ("sparse", True): "sparse, fine-tuned",
    ("merge", True): "merge, fine-tuned",
    ("merge_quarters", True): "merge by quarters, fine-tuned",
    ("gate", True): "gate, fine-tuned",
    ("gate_quarters", True): "gate by quarters, fine-tuned",
    ("merge_gate", True): "merge with a gate, fine-tuned",
}


@dataclass(frozen=True)
class Curve:
    """Excess of the validation loss over dense, in percent, by ratio; one value per seed.

    Args:
        label: what was measured.
        trained_for: the ratio that it was fine-tuned for; `None` without fine-tuning.
        excess: from the ratio to the values.
    """

    label: str
    trained_for: float | None
    excess: dict[float, list[float]]


def summarise(results: dict) -> list[Curve]:
    """Curves relative to dense: the untrained model's for untrained ones, else that of the same seed's dense run.

    Without dense runs, everything is relative to the untrained dense model.
    """
    untrained = results["untrained"]
    if not untrained:
        return []
    before = _mean(untrained["dense"]["1"])
    after = {run["seed"]: _mean(run["losses"]["1"]) for run in results["runs"].values() if run["variant"] == "dense"}
    curves = [
        Curve(LABELS[variant, False], None, {float(r): [_percent(loss, before)] for r, loss in losses.items()})
        for variant, losses in untrained.items()
        if variant != "dense"
    ]
    groups: dict[tuple[str, float], dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run in results["runs"].values():
        for ratio, loss in run["losses"].items():
            excess = groups[run["variant"], run["ratio"]]
            excess[float(ratio)].append(_percent(loss, after.get(run["seed"], before)))
    curves += [Curve(LABELS[variant, True], ratio, dict(excess)) for (variant, ratio), excess in groups.items()]
    return curves


def table_of(curves: list[Curve]) -> Table:
    """One row per curve: mean and range over seeds, in percent above dense."""
    ratios = sorted({ratio for curve in curves for ratio in curve.excess}, reverse=True)
    table = Table(title="Validation loss above dense, %: mean (lowest to highest seed)")
    table.add_column("")
    table.add_column("trained for")
    for ratio in ratios:
        table.add_column(f"{ratio:g}", justify="right")
    for curve in curves:
        cells = [_cell(curve.excess.get(ratio)) for ratio in ratios]
        table.add_row(curve.label, "" if curve.trained_for is None else f"{curve.trained_for:g}", *cells)
    return table


def draw(curves: list[Curve], path: Path) -> None:
    """Excess against ratio; bars span the seeds."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5))
    for curve in curves:
        ratios = sorted(curve.excess)
        means = [statistics.fmean(curve.excess[ratio]) for ratio in ratios]
        below = [mean - min(curve.excess[ratio]) for mean, ratio in zip(means, ratios, strict=True)]
        above = [max(curve.excess[ratio]) - mean for mean, ratio in zip(means, ratios, strict=True)]
        label = curve.label if curve.trained_for in (None, 1.0) else f"{curve.label} for {curve.trained_for:g}"
        style = "--" if curve.trained_for is None else "-"
        axes.errorbar(ratios, means, yerr=[below, above], marker="o", capsize=3, linestyle=style, label=label)
    axes.set(xscale="log", xlabel="top_k_ratio", ylabel="validation loss above dense, %")
    ticks = sorted({ratio for curve in curves for ratio in curve.excess})
    axes.set_xticks(ticks, [f"{ratio:g}" for ratio in ticks])
    axes.minorticks_off()
    axes.axhline(1.0, color="grey", linewidth=0.8)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _mean(losses: list[float]) -> float:
    return statistics.fmean(losses)


def _percent(losses: list[float], dense: float) -> float:
    return 100 * (_mean(losses) / dense - 1)


def _cell(values: list[float] | None) -> str:
    if not values:
        return ""
    mean = f"{statistics.fmean(values):+.2f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):+.2f} to {max(values):+.2f})"
