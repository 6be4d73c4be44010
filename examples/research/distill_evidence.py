"""Fine-tune the tiny Wan model for sparse attention by its clips, and by the dense model, in equal steps.

    PYTHONPATH=examples/training python examples/research/distill_evidence.py --latents runs/latents \
        --output runs/distillation --minutes 5

The steps, clips, noise and held-out loss of `vsa_evidence.py`, whose model, merge by quarters with blocks of (4, 4, 4)
and the first layer dense, ends 16 % above dense at a ratio of 0.125. Several runs share a GPU, since one alone leaves
it idle. Every finished run goes to `results.json` at once; the same command goes on with those that are missing, and
ends with status 75 while some still are.
"""

from __future__ import annotations

import copy
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import WanPipeline, WanTransformer3DModel
from rich.console import Console
from rich.table import Table
from vsa_training.identity import module_digest
from vsa_training.sparsity import SparsityRamp

from tiny_evidence import Material, Recipe, fine_tune, load_material, prepare, validation_loss
from tiny_wan_transformer import Clips, encode_clips
from vsa_diffusers import set_top_k_ratio
from vsa_diffusers.cli.options import Json
from vsa_diffusers.cli.output import print_json
from vsa_diffusers.cli.script import run_script
from vsa_diffusers.files import read_json, replaced_file

MODEL = Path(__file__).parents[1] / "tiny_wan"
UNFINISHED = 75
OPTIMIZER = dict(optimizer="muon", lr=2e-4, gate_lr=1e-3)
DISTIL, ANNEALED = dict(objective="distill"), dict(ramp=0.5, first_ratio=0.5)
FAST, ENDS, GATES = dict(lr=1e-3), dict(dense_layers=(0, -1)), dict(trainable="gates")


@dataclass(frozen=True)
class Way:
    """How a model is trained.

    Args:
        label: for people.
        changes: fields of the recipe.
        variant: how the model attends.
    """

    label: str
    changes: dict[str, Any] = field(default_factory=dict)
    variant: str = "merge_quarters"


def _ways(attention: float) -> dict[str, Way]:
    """All ways by name, most important first."""
    both, light = (DISTIL | dict(distill_attention=weight) for weight in (attention, attention / 10))
    return {
        "dense": Way("dense", variant="dense"),
        "diffusion": Way("diffusion loss"),
        "output": Way("distilled: output", DISTIL),
        "attention": Way(f"distilled: output, attention ({attention:g})", both),
        "output_fast": Way("distilled: output; 1e-3", DISTIL | FAST),
        "attention_light": Way(f"distilled: output, attention ({attention / 10:g})", light),
        "attention_fast": Way(f"distilled: output, attention ({attention:g}); 1e-3", both | FAST),
        "diffusion_fast": Way("diffusion loss; 1e-3", FAST),
        "output_annealed": Way("distilled: output; annealed", DISTIL | ANNEALED),
        "attention_annealed": Way(f"distilled: output, attention ({attention:g}); annealed", both | ANNEALED),
        "diffusion_annealed": Way("diffusion loss; annealed", ANNEALED),
        "ends": Way("diffusion loss; last layer dense", ENDS),
        "ends_output_fast": Way("distilled: output; 1e-3, last layer dense", DISTIL | ENDS | FAST),
        "gates": Way("diffusion loss; gates only", GATES, "gate_quarters"),
        "gates_output": Way("distilled: output; gates only", DISTIL | GATES, "gate_quarters"),
    }


NAMES = tuple(_ways(0.0))


def main(
    latents: Annotated[Path, typer.Option(help="Folder of encoded clips; missing clips are encoded first.")] = Path(
        "runs/latents"
    ),
    output: Annotated[Path, typer.Option(help="Folder for results.json.")] = Path("runs/distillation"),
    model: Annotated[
        Path, typer.Option(help="Directory of the tiny Wan pipeline.", exists=True, file_okay=False)
    ] = MODEL,
    ways: Annotated[str, typer.Option(help=f"How to train, most important first: of {', '.join(NAMES)}.")] = ",".join(
        NAMES
    ),
    clips: Annotated[int, typer.Option(help="Clips to train on, a multiple of 32.")] = 1024,
    side: Annotated[int, typer.Option(help="Height and width of the clips.")] = 256,
    frames: Annotated[int, typer.Option(help="Frames of the clips.")] = 61,
    held_out: Annotated[int, typer.Option(help="Held-out clips for validation.")] = 32,
    levels: Annotated[int, typer.Option(help="Noise levels at which each held-out clip is judged.")] = 4,
    ratio: Annotated[float, typer.Option(help="Ratio to train for and to judge at.", min=0.01, max=1.0)] = 0.125,
    attention: Annotated[float, typer.Option(help="Weight of the attention outputs' error.", min=0.0)] = 1.0,
    seeds: Annotated[int, typer.Option(help="Runs of each kind.", min=1)] = 2,
    steps: Annotated[int, typer.Option(help="Steps of each run.", min=1)] = 600,
    batch_size: Annotated[int, typer.Option(help="Clips per step.", min=1)] = 8,
    shift: Annotated[float, typer.Option(help="Shift of the noise levels, as the model was trained.")] = 3.0,
    workers: Annotated[int, typer.Option(help="Runs at a time on each GPU, or on the CPU.", min=1)] = 8,
    device: Annotated[str, typer.Option(help="cpu, cuda (every GPU there is), or auto.")] = "auto",
    minutes: Annotated[float | None, typer.Option(help="End then; runs that are not finished are lost.")] = None,
    report_only: Annotated[bool, typer.Option(help="Only show what is in results.json.")] = False,
    as_json: Json = False,
) -> None:
    """Train the tiny Wan model for sparse attention by its clips and by the dense model, in equal steps."""
    deadline = time.time() + 60 * (10**6 if minutes is None else minutes)
    told = Console(stderr=True)
    devices = _devices(device)
    known = _ways(attention)
    chosen = _names(ways, known)
    recipe = Recipe(steps=steps, batch_size=batch_size, ramp=0.0, trainable="all", shift=shift, dense_layers=(0,),
                    **OPTIMIZER)  # fmt: skip
    setting = _Setting(model, latents, Clips(side, frames, clips), held_out, levels, ratio, recipe)
    settings = asdict(recipe) | dict(
        clips=clips, side=side, frames=frames, held_out=held_out, levels=levels, ratio=ratio, attention=attention
    )
    results = _open_results(output / "results.json", settings, devices[0])
    wanted = {f"{name}-seed{seed}": (name, seed) for name in chosen for seed in range(seeds)}
    missing = {key: run for key, run in wanted.items() if key not in results["runs"]}
    if missing and not report_only:
        # Before the processes that share them.
        pipe = WanPipeline.from_pretrained(model, local_files_only=True)
        digest = module_digest(pipe.transformer)
        if results.setdefault("model", digest) != digest:
            raise typer.BadParameter(
                f"{output / 'results.json'} is of another model than --model {model}; choose another --output."
            )
        encode_clips(latents, pipe.vae, setting.clips, torch.device(devices[0]))
        told.print(f"{len(missing)} runs of {steps} steps, {workers} at a time on {', '.join(devices)}.")
        for key, report in _trained(setting, known, missing, devices, workers, deadline):
            if report is None:
                told.print(f"{key}: out of time.")
                continue
            results["untrained"] = results["untrained"] or report.pop("untrained")
            results["runs"][key] = {name: value for name, value in report.items() if name != "untrained"}
            _write(output, results)
            told.print(f"{key}: loss {report['loss']:.5f}, {report['seconds']} s")
    rows = summarise(results, known)
    if as_json:
        print_json({"settings": settings, "device": results["device"], "rows": rows})
    else:
        Console().print(table_of(rows))
    left = [key for key in wanted if key not in results["runs"]]
    if left and not report_only:
        told.print(f"Out of time with {len(left)} of {len(wanted)} runs to go; the same command goes on.")
        raise typer.Exit(UNFINISHED)


@dataclass(frozen=True)
class _Setting:
    """What all runs have in common."""

    model: Path
    latents: Path
    clips: Clips
    held_out: int
    levels: int
    ratio: float
    recipe: Recipe


class _Worker:
    """A process's part of a device, with the model and the clips on it."""

    running: _Worker  # one a process

    def __init__(self, setting: _Setting, device: str, deadline: float):
        torch.set_num_threads(1)
        torch.set_float32_matmul_precision("high")
        self.setting, self.deadline, self.longest = setting, deadline, 0.0
        self.device = torch.device(device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        pipe = WanPipeline.from_pretrained(setting.model, local_files_only=True)
        self.material: Material = load_material(
            pipe, setting.latents, setting.clips, setting.held_out, setting.levels, setting.recipe.shift, self.device
        )
        self.base: WanTransformer3DModel = pipe.transformer.to(self.device).requires_grad_(False).eval()

    def train(self, way: Way, seed: int) -> dict[str, Any] | None:
        """What came of a run, or `None` if it would not end in time."""
        started = time.time()
        if started + self.longest > self.deadline:
            return None
        recipe = replace(self.setting.recipe, **way.changes)
        ratio = 1.0 if way.variant == "dense" else self.setting.ratio
        teacher = copy.deepcopy(self.base) if recipe.objective == "distill" else None
        model = prepare(self.base, way.variant, ratio, self.device, recipe).requires_grad_(True)

        def check_time(step: int, loss: float) -> None:
            if step % 100 == 0:
                pace = (time.time() - started) / step
                print(f"{way.label}, seed {seed}: step {step}, {pace:.3f} s each", file=sys.stderr, flush=True)
            if time.time() > self.deadline:
                raise TimeoutError

        try:
            report = fine_tune(model, way.variant, ratio, self.material, recipe, seed, check_time, teacher)
        except TimeoutError:
            return None
        if way.variant != "dense":
            set_top_k_ratio(model, ratio)
        ramp = SparsityRamp(ratio, round(recipe.ramp * recipe.steps), first=max(ratio, recipe.first_ratio))
        report |= {
            "loss": self.loss(model),
            "untrained": {"dense": self.loss(self.base)},
            "kept": statistics.fmean(ramp.ratio(step) for step in range(recipe.steps)),
        }
        self.longest = max(self.longest, time.time() - started)
        return report

    def loss(self, model: torch.nn.Module) -> float:
        """On the held-out clips."""
        return statistics.fmean(validation_loss(model, self.material, self.setting.recipe.batch_size))


def _start(setting: _Setting, devices: Any, deadline: float) -> None:
    _Worker.running = _Worker(setting, devices.get(), deadline)


def _train(way: Way, seed: int) -> dict[str, Any] | None:
    return _Worker.running.train(way, seed)


def _trained(
    setting: _Setting,
    known: dict[str, Way],
    runs: dict[str, tuple[str, int]],
    devices: list[str],
    workers: int,
    deadline: float,
) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """Keys and reports of the runs, as they finish."""
    context = multiprocessing.get_context("spawn")
    places = context.Queue()
    count = min(len(runs), workers * len(devices))
    for place in range(count):
        places.put(devices[place % len(devices)])
    with ProcessPoolExecutor(count, context, _start, (setting, places, deadline)) as pool:
        futures: dict[Future, str] = {pool.submit(_train, known[name], seed): key for key, (name, seed) in runs.items()}
        for future in as_completed(futures):
            yield futures[future], future.result()


def summarise(results: dict[str, Any], known: dict[str, Way]) -> list[dict[str, Any]]:
    """A row for each way that ran: percent above dense training of the same seed, and above the dense model before."""
    losses: dict[str, dict[int, dict[str, Any]]] = {}
    for key, run in results["runs"].items():
        name, _, seed = key.rpartition("-seed")
        losses.setdefault(name, {})[int(seed)] = run
    dense = {seed: run["loss"] for seed, run in losses.get("dense", {}).items()}
    rows = []
    for name in (name for name in known if name in losses):
        runs = losses[name]
        trained = [100 * (run["loss"] / dense[seed] - 1) for seed, run in sorted(runs.items()) if seed in dense]
        before = [100 * (run["loss"] / results["untrained"]["dense"] - 1) for _, run in sorted(runs.items())]
        rows.append({
            "way": name,
            "label": known[name].label,
            "seeds": sorted(runs),
            "loss": [runs[seed]["loss"] for seed in sorted(runs)],
            "above_dense_training_percent": trained,
            "above_dense_model_percent": before,
            "mean_ratio_in_training": next(iter(runs.values()))["kept"],
            "seconds": [runs[seed]["seconds"] for seed in sorted(runs)],
        })  # fmt: skip
    return rows


def table_of(rows: list[dict[str, Any]]) -> Table:
    """For people."""
    table = Table(title="Validation loss above dense, %: mean (lowest to highest seed)")
    for column in ("", "above dense training", "above the dense model", "mean ratio in training", "seeds", "seconds"):
        table.add_column(column, justify="left" if not column else "right")
    for row in rows:
        table.add_row(
            row["label"], _spread(row["above_dense_training_percent"]), _spread(row["above_dense_model_percent"]),
            f"{row['mean_ratio_in_training']:.3g}", str(len(row["seeds"])), f"{statistics.fmean(row['seconds']):.0f}",
        )  # fmt: skip
    return table


def _spread(values: list[float]) -> str:
    if not values:
        return ""
    return f"{statistics.fmean(values):+.2f} ({min(values):+.2f} to {max(values):+.2f})"


def _devices(asked: str) -> list[str]:
    if asked not in ("auto", "cpu", "cuda"):
        raise typer.BadParameter(f"device={asked!r} is unknown; choose cpu, cuda or auto.")
    count = torch.cuda.device_count()
    if asked == "cuda" and not count:
        raise typer.BadParameter("device='cuda' needs a GPU, and PyTorch finds none; choose cpu.")
    return ["cpu"] if asked == "cpu" or not count else [f"cuda:{index}" for index in range(count)]


def _names(text: str, known: dict[str, Way]) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise typer.BadParameter(f"ways has unknown {unknown}; choose from {', '.join(known)}.")
    return names


def _open_results(path: Path, settings: dict[str, Any], device: str) -> dict[str, Any]:
    """The results so far, or new ones.

    Raises:
        typer.BadParameter: those in the file were made with other settings.
    """
    settings = settings | {"dense_layers": list(settings["dense_layers"]), "block_size": list(settings["block_size"])}
    where = "cpu" if device == "cpu" else torch.cuda.get_device_name(device)
    if not path.exists():
        return {"settings": settings, "device": where, "torch": torch.__version__, "untrained": {}, "runs": {}}
    results = read_json(path)
    if {"settings", "untrained", "runs"} - results.keys():
        raise typer.BadParameter(f"{path} holds no results of this script; choose another --output.")
    changed = [name for name, value in settings.items() if results["settings"].get(name) != value]
    if changed:
        raise typer.BadParameter(f"{path} was made with other values of {', '.join(changed)}; choose another --output.")
    return results


def _write(folder: Path, results: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with replaced_file(folder / "results.json") as partial:
        partial.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    run_script(main)
