"""What sparsity costs the tiny Wan model, and how much of it fine-tuning wins back.

    PYTHONPATH=examples/training python examples/research/vsa_evidence.py --latents runs/latents --minutes 9

Measures the validation loss against the ratio: of the model as it is, and after fine-tuning it with VSA (gate, merge,
each with tiles scored by means or by quarters, and merge with a gate) or dense for as many steps, on the same clips,
noise and noise levels. Every finished run goes to `results.json` at once; the same command goes on with those that are
missing, and ends with status 75 while some still are. Table and plot show the losses relative to the dense model
with the same extra training.
"""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Annotated

import torch
import typer
from diffusers import WanPipeline
from evidence_report import draw, summarise, table_of
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from tiny_evidence import (
    VARIANTS,
    Material,
    Recipe,
    fine_tune,
    load_material,
    losses_by_ratio,
    prepare,
)
from tiny_wan_transformer import Clips
from vsa_diffusers import save_vsa, set_top_k_ratio
from vsa_diffusers.cli.script import run_script, script_app
from vsa_diffusers.files import read_json, replaced_file
from vsa_diffusers.tiles import check_block_size

MODEL = Path(__file__).parents[1] / "tiny_wan"
UNFINISHED = 75


def main(
    latents: Annotated[Path, typer.Option(help="Folder of encoded clips; missing clips are encoded first.")] = Path(
        "runs/latents"
    ),
    output: Annotated[Path, typer.Option(help="Folder for results.json and the plot.")] = Path("runs/evidence"),
    model: Annotated[
        Path, typer.Option(help="Directory of the tiny Wan pipeline.", exists=True, file_okay=False)
    ] = MODEL,
    clips: Annotated[int, typer.Option(help="Clips to train on, a multiple of 32.")] = 2048,
    side: Annotated[int, typer.Option(help="Height and width of the clips.")] = 256,
    frames: Annotated[int, typer.Option(help="Frames of the clips.")] = 61,
    held_out: Annotated[int, typer.Option(help="Held-out clips for validation.")] = 64,
    levels: Annotated[int, typer.Option(help="Noise levels at which each held-out clip is judged.")] = 4,
    ratios: Annotated[str, typer.Option(help="Ratios to measure.")] = "1,0.5,0.3,0.2,0.125,0.0625",
    train_ratios: Annotated[str, typer.Option(help="Ratios to fine-tune for, most important first.")] = "0.125",
    variants: Annotated[str, typer.Option(help=f"What to fine-tune, of {', '.join(VARIANTS)}.")] = "dense,gate,merge",
    seeds: Annotated[int, typer.Option(help="Fine-tunings of each kind.")] = 3,
    first_seed: Annotated[int, typer.Option(help="Seed of the first of them.")] = 0,
    steps: Annotated[int, typer.Option(help="Steps of each fine-tuning.")] = 300,
    batch_size: Annotated[int, typer.Option(help="Clips per step.")] = 16,
    optimizer: Annotated[str, typer.Option(help="adamw, or muon for the matrices of the blocks.")] = "adamw",
    lr: Annotated[float, typer.Option(help="Learning rate of everything but gates.")] = 3e-4,
    gate_lr: Annotated[float, typer.Option(help="Learning rate of gates.")] = 1e-3,
    ramp: Annotated[
        float, typer.Option(help="Share of the steps in which the ratio falls from 1 to the target.")
    ] = 0.3,
    trainable: Annotated[str, typer.Option(help="all, attention or gates; dense then trains all.")] = "all",
    dense_layers: Annotated[str, typer.Option(help="Layers that stay dense, such as 0 or 0,-1.")] = "",
    block_size: Annotated[str, typer.Option(help="Tokens per tile along time, height and width.")] = "4,4,4",
    compile_blocks: Annotated[
        bool, typer.Option("--compile", help="Compile the blocks for training; needs --ramp 0 to pay.")
    ] = False,
    shift: Annotated[float, typer.Option(help="Shift of the noise levels, as the model was trained.")] = 3.0,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto.")] = "auto",
    minutes: Annotated[float | None, typer.Option(help="Start no run that would end later than this.")] = None,
    report_only: Annotated[bool, typer.Option(help="Only show and draw what is in results.json.")] = False,
    keep: Annotated[bool, typer.Option(help="Save every fine-tuned model in the output folder.")] = False,
) -> None:
    """Measure the validation loss against the ratio, before and after fine-tuning."""
    started = time.monotonic()
    console = Console()
    torch_device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    layers = tuple(int(layer) for layer in dense_layers.split(",") if layer)
    block = block_of(block_size)
    recipe = Recipe(steps, batch_size, lr, gate_lr, ramp, trainable, shift, optimizer, layers, compile_blocks, block)
    settings = asdict(recipe) | dict(clips=clips, side=side, frames=frames, held_out=held_out, levels=levels)
    results = open_results(output / "results.json", {} if report_only else settings, torch_device)
    measured = numbers(ratios)
    wanted = list(plan(names(variants), numbers(train_ratios), range(first_seed, first_seed + seeds), trainable))
    missing = [run for run in wanted if key_of(*run) not in results["runs"]]

    if report_only:
        report_on(results, output, console)
        return

    pipe = WanPipeline.from_pretrained(model, local_files_only=True)
    material = load_material(pipe, latents, Clips(side, frames, clips), held_out, levels, shift, torch_device)
    measure_untrained(pipe.transformer, results, measured, material, recipe, torch_device)
    write(output, results)
    deadline = None if minutes is None else started + 60 * minutes
    with progress_bars(console) as progress:
        for report, tuned in fine_tunings(
            pipe.transformer, missing, material, recipe, torch_device, deadline, progress
        ):
            report["losses"] = losses_by_ratio(tuned, report["variant"], measured, material, recipe)
            name = key_of(report["variant"], report["ratio"], report["seed"])
            results["runs"][name] = report
            write(output, results)
            how = VARIANTS[report["variant"]]
            if keep and how.combine is not None and how.in_package:
                save_vsa(set_top_k_ratio(tuned, report["ratio"]), output / name, dtype=torch.float16)

    report_on(results, output, console)
    left = [name for name in (key_of(*run) for run in wanted) if name not in results["runs"]]
    if left:
        console.print(f"Out of time with {len(left)} of {len(wanted)} runs to go; run the same command again to go on.")
        raise typer.Exit(UNFINISHED)


def report_on(results: dict, output: Path, console: Console) -> None:
    """The table, and the plot where matplotlib is installed."""
    curves = summarise(results)
    if curves:
        console.print(table_of(curves))
    if importlib.util.find_spec("matplotlib") is None:
        console.print("matplotlib is not installed; draw the plot elsewhere with the same command and --report-only.")
    elif curves:
        draw(curves, output / "loss_by_ratio.png")
    console.print(f"Results: {output / 'results.json'}.")


def fine_tunings(
    base: torch.nn.Module,
    runs: list[tuple[str, float, int]],
    material: Material,
    recipe: Recipe,
    device: torch.device,
    deadline: float | None,
    progress: Progress,
) -> Iterator[tuple[dict, torch.nn.Module]]:
    """Report and model of one run after the other, until the next one would end after the deadline."""
    longest = 0.0
    for variant, ratio, seed in runs:
        started = time.monotonic()
        if deadline is not None and started + 1.1 * longest > deadline:
            return
        task = progress.add_task(key_of(variant, ratio, seed), total=recipe.steps, text="")
        tuned = prepare(base, variant, ratio, device, recipe)

        def show(step: int, loss: float, task=task) -> None:
            progress.update(task, completed=step, text=f"loss {loss:.4f}")

        report = fine_tune(tuned, variant, ratio, material, recipe, seed, show)
        progress.update(task, completed=recipe.steps, text=f"{report['seconds']} s")
        yield report | dict(variant=variant, ratio=ratio, seed=seed), tuned
        # With what the caller did with it: that takes time, too.
        longest = max(longest, time.monotonic() - started)


def progress_bars(console: Console) -> Progress:
    """One bar for each run."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("{task.fields[text]}"))
    return Progress(*columns, console=console)


def names(text: str) -> list[str]:
    """Variants from a comma-separated list."""
    chosen = [name.strip() for name in text.split(",")]
    unknown = [name for name in chosen if name not in VARIANTS]
    if unknown:
        raise typer.BadParameter(f"variants has unknown {unknown}; choose from {', '.join(VARIANTS)}.")
    return chosen


def numbers(text: str) -> list[float]:
    """Ratios from a comma-separated list."""
    ratios = [float(number) for number in text.split(",")]
    if not all(0 < ratio <= 1 for ratio in ratios):
        raise typer.BadParameter(f"ratios={text!r} must be numbers in (0, 1].")
    return ratios


def block_of(text: str) -> tuple[int, int, int]:
    """A block size from a comma-separated list."""
    try:
        return check_block_size([int(side) for side in text.split(",")])
    except ValueError as error:
        raise typer.BadParameter(f"block_size={text!r} is not a block such as 4,4,4: {error}") from error


def plan(
    variants: list[str], ratios: list[float], seeds: Iterable[int], trainable: str
) -> Iterator[tuple[str, float, int]]:
    """The runs, most important first; a dense one per seed, whatever the ratios."""
    for seed in seeds:
        for place, ratio in enumerate(ratios):
            for variant in variants:
                if variant == "dense":
                    if place == 0:
                        yield "dense", 1.0, seed
                elif trainable != "gates" or VARIANTS[variant].gates:
                    yield variant, ratio, seed


def key_of(variant: str, ratio: float, seed: int) -> str:
    """A run's name in the results."""
    return f"{variant}-{ratio:g}-seed{seed}"


def open_results(path: Path, settings: dict, device: torch.device) -> dict:
    """The results so far, or new ones. A setting that the file lacks was no option yet, and had its default.

    Raises:
        typer.BadParameter: those in the file were made with other settings.
    """
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    if not path.exists():
        return {"settings": settings, "device": where, "torch": torch.__version__, "untrained": {}, "runs": {}}
    try:
        results = read_json(path)
    except ValueError as error:
        raise typer.BadParameter(f"{error} Or choose another --output.") from error
    if {"settings", "untrained", "runs"} - results.keys():
        raise typer.BadParameter(f"{path} holds no results of this script; choose another --output.")
    defaults = {field.name: field.default for field in fields(Recipe) if field.default is not MISSING}
    settings, defaults = json.loads(json.dumps([settings, defaults]))  # a tuple comes back as a list
    recorded = defaults | results["settings"]
    changed = [name for name, value in settings.items() if recorded.get(name) != value]
    if changed:
        raise typer.BadParameter(f"{path} was made with other values of {', '.join(changed)}; choose another --output.")
    return results


def measure_untrained(
    base: torch.nn.Module, results: dict, ratios: list[float], material: Material, recipe: Recipe, device: torch.device
) -> None:
    """Add what the model loses without any fine-tuning, at ratios that are not there yet."""
    for variant in ("dense", "sparse", "merge", "merge_quarters"):
        done = results["untrained"].setdefault(variant, {})
        new = [ratio for ratio in ratios if f"{ratio:g}" not in done and variant != "dense"]
        if new or (variant == "dense" and not done):
            model = prepare(base, variant, new[0] if new else 1.0, device, recipe)
            done |= losses_by_ratio(model, variant, new, material, recipe)


def write(folder: Path, results: dict) -> None:
    """Replace `results.json` at once, so that a kill leaves the old one or the new one."""
    folder.mkdir(parents=True, exist_ok=True)
    with replaced_file(folder / "results.json") as partial:
        partial.write_text(json.dumps(results, indent=1) + "\n")


app = script_app(main)

if __name__ == "__main__":
    torch.set_float32_matmul_precision("high")
    run_script(main)
