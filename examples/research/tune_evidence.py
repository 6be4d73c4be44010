"""What tuning gains on videos that it was not tuned on: tuned settings of the tiny Wan model against the default.

    PYTHONPATH=examples/training python examples/research/tune_evidence.py --output runs/tune
    PYTHONPATH=examples/training python examples/research/tune_evidence.py --found tuning/results.json --more ""

Tunes for each target by a few captions of the training split and one seed. Then held-out captions, with seeds of their
own, are made dense, with each tuned setting, and with `enable_vsa(pipe, top_k_ratio=...)`, all else by default, where
that keeps at least as many tiles; and with the tuned setting's schedule, block and selection in all layers alike, where
that keeps at least as many, which tells what the layers' ratios add. Last, the default at higher ratios says what share
of the tiles it needs for the tuned setting's PSNR. All gains are differences within pairs of caption and seed, with
their spread. What is done is printed after each seed. With --found nothing is tuned: what `tune` wrote elsewhere, for
the same model, size and steps, is judged.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from procedural_video import descriptions
from rich.console import Console
from rich.table import Table

from tiny_wan_evaluation import held_out_captions
from vsa_diffusers import VSAConfig
from vsa_diffusers.cli.progress import progress_bars
from vsa_diffusers.cli.script import run_script
from vsa_diffusers.comparison import Comparison, Setting
from vsa_diffusers.comparison.api import measure_settings
from vsa_diffusers.comparison.store import Store
from vsa_diffusers.files import read_json, replaced_file
from vsa_diffusers.generation.loading import load_pipeline, place, recommended_call
from vsa_diffusers.tuning import Tuning, tune
from vsa_diffusers.tuning.probe import Probe, Tiling
from vsa_diffusers.tuning.report import verdict
from vsa_diffusers.tuning.search import SHAPES, Cost, Search, Shape

MODEL = Path(__file__).parents[1] / "tiny_wan"
FIRST_SEED = 1000


@dataclass(frozen=True)
class Tuned:
    """What a tuning found.

    Args:
        target: PSNR, dB.
        name: of its best setting.
        config: of that, as `enable_vsa` takes it.
        kept: share of the tiles that it keeps.
        shape: its schedule; `None` if that is the default.
        is_met: whether it reaches the target on what it was tuned by.
        probe: what was measured of the layers.
        prompts: what it was tuned by.
    """

    target: float
    name: str
    config: Any
    kept: float
    shape: Shape | None
    is_met: bool
    probe: Probe
    prompts: tuple[str, ...]

    @classmethod
    def of(cls, tuning: Tuning) -> Tuned:
        best = tuning.best
        shape = None if best.allocation is None else best.allocation.shape
        return cls(tuning.target.value, best.name, best.config, best.kept, shape, tuning.is_met, tuning.probe,
                   tuple(tuning.comparison.prompts))  # fmt: skip

    @classmethod
    def read(cls, path: Path, call: dict[str, Any]) -> Tuned:
        """From a tuning's results.json.

        Raises:
            ValueError: it was tuned for something else than a PSNR, or with other arguments of the call.
        """
        results = read_json(path)
        if results["target"].keys() != {"psnr"} or results["arguments"] != call:
            raise ValueError(
                f"{path} was tuned for {results['target']} with {results['arguments']}; this judges PSNR, with {call}."
            )
        best = next(point for point in results["points"] if point["name"] == results["best"])
        seen = results["probe"]
        block = seen["block_size"]
        probe = Probe(
            tuple(seen["layers"]), tuple(seen["steps"]), seen["total"], seen["tiles"], seen["default_tiles"],
            Tiling(block if isinstance(block, str) else tuple(block), seen["selection"], math.nan, math.nan),
            np.array(seen["errors"]), np.array(seen["gains"]), {}, 0.0, 0.0,
        )  # fmt: skip
        shape = SHAPES.get(best["schedule"].removesuffix(", even"))
        return cls(results["target"]["psnr"], best["name"], best["config"], best["kept"], shape, results["met"], probe,
                   tuple(results["prompts"]))  # fmt: skip


def main(
    output: Annotated[Path, typer.Option("--output", "-o", help="Where everything is written.")] = Path(
        "tune_evidence"
    ),
    psnr: Annotated[str, typer.Option(help="Targets, dB.")] = "22,30",
    tuned_by: Annotated[int, typer.Option(help="Captions of the training split that are tuned by.")] = 12,
    captions: Annotated[int, typer.Option(help="Held-out captions.")] = 6,
    seeds: Annotated[int, typer.Option(help="Seeds of each of them.")] = 2,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 20,
    frames: Annotated[int, typer.Option(help="Of each video.")] = 61,
    height: Annotated[int, typer.Option(help="Of each video.")] = 256,
    width: Annotated[int, typer.Option(help="Of each video.")] = 256,
    rounds: Annotated[int, typer.Option(help="As in tune.")] = 3,
    more: Annotated[
        str, typer.Option(help="Times the tuned setting's share of the tiles, at which the default is made, too.")
    ] = "1.25,1.6,2.0,2.6",
    found: Annotated[str, typer.Option(help="Judge these instead: results.json files that tune wrote.")] = "",
    model: Annotated[Path, typer.Option(help="Directory of the tiny Wan model.", exists=True, file_okay=False)] = MODEL,
) -> None:
    """Print a table, and write evidence.json."""
    begin = time.perf_counter()
    call, _ = recommended_call(model)
    call |= {"num_inference_steps": steps, "num_frames": frames, "height": height, "width": width}
    del call["prompt"]
    pipe = load_pipeline(model)
    place(pipe)
    train, held_out = descriptions("train"), [each.caption for each in held_out_captions(captions)]
    prompts = [train[(2 * index + 1) * len(train) // (2 * tuned_by)].caption for index in range(tuned_by)]
    tunings = [Tuned.read(Path(path), call) for path in found.split(",") if path]
    targets = [] if tunings else [float(target) for target in psnr.split(",")]
    output.mkdir(parents=True, exist_ok=True)
    with progress_bars() as progress:
        for target in targets:
            tuning = tune(
                pipe, prompts, output / "tuning", psnr=target, arguments=call, rounds=rounds, keep_videos=False,
                progress=progress,
            )  # fmt: skip
            tell(tuning, begin)
            tunings.append(Tuned.of(tuning))
        facts = {"held_out": held_out, "seconds_of_tuning": time.perf_counter() - begin if targets else None}
        settings = settings_of(tunings, [float(factor) for factor in more.split(",") if factor])
        comparisons = []
        for seed in range(FIRST_SEED, FIRST_SEED + seeds):
            comparisons.append(
                measure_settings(
                    pipe, held_out, [setting for setting, _ in settings], output, Store(None), arguments=call,
                    seed=seed, progress=progress,
                )
            )  # fmt: skip
            judged = [summary(tuning, settings, comparisons) for tuning in tunings]
            known = comparisons[0].facts
            everything = {
                **{name: known[name] for name in ("hardware", "dtype", "versions")}, "call": call, **facts,
                "seeds": list(range(FIRST_SEED, seed + 1)), "seconds": time.perf_counter() - begin, "targets": judged,
            }  # fmt: skip
            with replaced_file(output / "evidence.json") as partial:
                partial.write_text(json.dumps(everything, indent=1) + "\n")
            print_table(everything)


def tell(tuning: Tuning, begin: float) -> None:
    """Print what a tuning found, and when."""
    Console(width=120).print(tuning.table(), verdict(tuning), f"after {time.perf_counter() - begin:.0f} s")


def settings_of(tunings: list[Tuned], more: list[float]) -> list[tuple[Setting, dict[str, Any]]]:
    """What is made of the held-out captions, and what it is: for which target, of what kind, and what it keeps."""
    settings: list[tuple[Setting, dict[str, Any]]] = []
    for tuning in tunings:
        probe, tiles = tuning.probe, tuning.probe.default_tiles

        def add(kind: str, config: Any, kept: float, target: float = tuning.target) -> None:
            name = f"{kind} {target:g} at {kept:.4f}"
            settings.append((Setting(name, config), {"target": target, "kind": kind, "kept": kept}))

        add("tuned", tuning.config, tuning.kept)
        share = math.ceil(tuning.kept * tiles - 1e-6) / tiles  # so that the default keeps no less
        add("default", VSAConfig(share), share)
        if tuning.shape is not None and tuning.shape.name != "constant":
            alike = Search(probe, Cost.of_probe(probe), tuning.shape, even=True).walk
            alone = next(each for each in alike if each.kept >= tuning.kept)
            add("schedule alone", alone.config(probe), alone.kept)
        counts = {math.ceil(factor * tuning.kept * tiles) for factor in more}
        for count in sorted(count for count in counts if share * tiles < count < tiles):
            add("default, more", VSAConfig(count / tiles), count / tiles)
    return settings


def summary(
    tuning: Tuned, settings: list[tuple[Setting, dict[str, Any]]], comparisons: list[Comparison]
) -> dict[str, Any]:
    """Of one target: each setting over all pairs, and the tuned one less the others."""
    rows, of_kind = [], {}
    for index, (setting, what) in enumerate(settings, start=1):
        if what["target"] != tuning.target:
            continue
        close = [each for comparison in comparisons for each in comparison.results[index].close]
        dense = [each.denoising for comparison in comparisons for each in comparison.results[0].made]
        made = [each.denoising for comparison in comparisons for each in comparison.results[index].made]
        row = what | {"name": setting.name, "psnr": [min(each.psnr, 100.0) for each in close],
                      "ssim": [each.ssim for each in close], "denoising": made,
                      "speedup": sum(dense) / sum(made)}  # fmt: skip
        rows.append(row)
        of_kind.setdefault(what["kind"], row)
    tuned = of_kind["tuned"]
    differences = {}
    for kind in ("default", "schedule alone"):
        if kind in of_kind:
            pairs = zip(tuned["psnr"], of_kind[kind]["psnr"], strict=True)
            differences[kind] = statistics_of([ours - theirs for ours, theirs in pairs])
    equal = share_for(statistics.fmean(tuned["psnr"]), [row for row in rows if row["kind"].startswith("default")])
    return {
        "target": tuning.target, "tuned_by": tuning.prompts, "met_in_tuning": tuning.is_met, "best": tuning.name,
        "config": tuning.config, "rows": rows, "psnr_gained_over": differences,
        "default_share_of_equal_psnr": equal,
        "times_fewer_tiles_at_equal_psnr": None if equal is None else equal / tuned["kept"],
    }  # fmt: skip


def share_for(psnr: float, rows: list[dict[str, Any]]) -> float | None:
    """The share of the tiles at which the default has this mean PSNR, on lines between those made; `None` beyond."""
    points = sorted((row["kept"], statistics.fmean(row["psnr"])) for row in rows)
    for (low, below), (high, above) in itertools.pairwise(points):
        if below <= psnr <= above:
            return low + (high - low) * (psnr - below) / (above - below)
    return None


def statistics_of(values: list[float]) -> dict[str, float]:
    """Mean, standard deviation, standard error, least and most."""
    deviation = statistics.stdev(values) if len(values) > 1 else math.nan
    return {
        "mean": statistics.fmean(values), "standard_deviation": deviation,
        "standard_error": deviation / math.sqrt(len(values)), "least": min(values), "most": max(values),
    }  # fmt: skip


def print_table(everything: dict[str, Any]) -> None:
    console = Console(width=120)
    count = len(everything["held_out"]) * len(everything["seeds"])
    for found in everything["targets"]:
        table = Table(
            title=f"tuned for {found['target']:g} dB ({found['best']}); {count} pairs that it was not tuned on"
        )
        for heading in ("setting", "tiles kept", "PSNR, dB", "SSIM", "times dense"):
            table.add_column(heading, justify="left" if heading == "setting" else "right")
        for row in found["rows"]:
            psnr, ssim = statistics_of(row["psnr"]), statistics_of(row["ssim"])
            table.add_row(
                row["kind"], f"{row['kept']:.3f}", f"{psnr['mean']:.2f} ± {psnr['standard_deviation']:.2f}",
                f"{ssim['mean']:.4f} ± {ssim['standard_deviation']:.4f}", f"{row['speedup']:.2f}x",
            )  # fmt: skip
        console.print(table)
        for kind, gained in found["psnr_gained_over"].items():
            console.print(
                f"over {kind}: {gained['mean']:+.2f} dB ± {gained['standard_error']:.2f} (standard error), standard "
                f"deviation {gained['standard_deviation']:.2f}, from {gained['least']:+.2f} to {gained['most']:+.2f}"
            )
        if found["default_share_of_equal_psnr"] is not None:
            console.print(
                f"equal PSNR: the default keeps {found['default_share_of_equal_psnr']:.3f} of the tiles, "
                f"{found['times_fewer_tiles_at_equal_psnr']:.2f} times as many"
            )
    tuning = everything["seconds_of_tuning"]
    console.print(
        f"{everything['hardware']}, {everything['dtype']}: "
        f"{'' if tuning is None else f'{tuning:.0f} s of tuning, '}{everything['seconds']:.0f} s in all"
    )


if __name__ == "__main__":
    run_script(main)
