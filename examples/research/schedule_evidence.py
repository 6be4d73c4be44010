"""Where in a run tiles are best spent: videos under many schedules against the dense ones of the same noise.

    PYTHONPATH=examples/training python examples/research/schedule_evidence.py --pairs 16 --steps 20,8,4,50 \
        --json evidence.json --plot evidence.png
    PYTHONPATH=examples/training python examples/research/schedule_evidence.py --model runs/clips_wan \
        --grids 16x16x16,16x32x32,32x32x32 --pairs 8 --steps 25,8,4 --json clips.json --plot clips.png

The transformer alone is sampled from, as its pipeline would with its own scheduler and guidance, with VSA as
`enable_vsa` has it: merge, without training. Every pair is a prompt with a seed of its own: of the tiny Wan model a
held-out caption, of which a detector sees whether all is right, of the clips model one of its clips. PSNR and SSIM
compare a video with the dense one of the same pair. The share of tiles kept is what the processors kept, dense steps
included. Gain is the PSNR over that of constant ratios, of the same pair and interpolated at the same share kept; over
front is the same for a budget spent at the front.

The second table has the loss on held-out videos by noise level, at the levels of a run's steps: how much each ratio
adds to the dense loss, and how far its prediction is from the dense one, both relative. With --json all that is done is
kept, and a run that was interrupted goes on after it.
"""

import itertools
import json
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import typer
from flow_sampling import sample
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from schedule_models import EvidenceModel, load_evidence_model
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from vsa_training.objective import add_noise, shift_sigmas, velocity_error

from vsa_diffusers import RatioSchedule, disable_vsa, enable_vsa
from vsa_diffusers.cli.script import run_script
from vsa_diffusers.files import read_json, replaced_file
from vsa_diffusers.logs import warnings_only
from vsa_diffusers.tiles import TileGrid

MODEL = Path(__file__).parents[1] / "tiny_wan"
LEAST_MSE = 1e-10  # of videos that are the same, so that their PSNR is a number
LEVELS = 8
MEANS = (0.125, 0.2, 0.3, 0.4, 0.5)
GAINS = {"gain": "constant", "over_front": "front"}
"""Each over the family that it is told over."""
MEASURES = ("psnr", "ssim", *GAINS, "right")
Row = dict[str, Any]


def _ramp(first: float, last: float, power: float) -> tuple[str, Row]:
    return f"{first:g} to {last:g}, power {power:g}", {"schedule": RatioSchedule.ramp(first, last, power)}


# By family and name, what enable_vsa is given.
VARIANTS: dict[str, dict[str, Row]] = {
    "dense": {"": {}},
    "constant": {f"{mean:g}": {"top_k_ratio": mean, "schedule": "constant"} for mean in MEANS},
    "front": {f"{mean:g}": {"top_k_ratio": mean, "schedule": "front"} for mean in MEANS},
    "dense, then constant": {
        f"{share:g}, then {ratio:g}": {"top_k_ratio": ratio, "dense_steps": share, "schedule": "constant"}
        for share, ratio in ((0.2, 0.0625), (0.2, 0.125), (0.12, 0.2))
    },
    "ramp": dict(
        _ramp(*curve)
        for curve in ((0.5, 0.05, 1), (0.55, 0.05, 2), (0.65, 0.05, 2), (0.8, 0.05, 2), (1.0, 0.05, 2), (1.0, 0.05, 3),
                      (1.0, 0.05, 4))
    ),
    "rising": dict([_ramp(0.1, 0.5, 1)]),
}  # fmt: skip


class Evidence:
    """All rows so far, in a file if there is one: of videos (`rows`) and of losses (`losses`).

    Raises:
        ValueError: the file is of another model or another training of it, or of other dense layers.
    """

    def __init__(self, path: Path | None, about: Row):
        self.path, self.about = path, about
        self.rows: list[Row] = []
        self.losses: list[Row] = []
        if path is not None and path.exists():
            kept = read_json(path)
            there = {name: kept["about"].get(name) for name in ("model", "described", "dense_layers")}
            if any(about[name] != value for name, value in there.items()):
                raise ValueError(f"{path} is of {there}; give another file, or the same model and settings.")
            self.rows, self.losses = kept["rows"], kept["losses"]

    def save(self) -> None:
        if self.path is not None:
            content = {"about": self.about, "rows": self.rows, "losses": self.losses}
            with replaced_file(self.path) as partial:
                partial.write_text(json.dumps(content, indent=1) + "\n")

    def videos_judged(self, grid: str) -> int:
        """How many held-out videos there are losses of."""
        return len({row["video"] for row in self.losses if row["grid"] == grid})

    def missing_pairs(self, grid: str, steps: int, family: str, name: str, pairs: Iterable[int]) -> list[int]:
        key = (grid, steps, family, name)
        done = {row["pair"] for row in self.rows if tuple(row[part] for part in _VARIANT) == key}
        return [pair for pair in pairs if pair not in done]


_VARIANT = ("grid", "steps", "family", "name")


@contextmanager
def attending(model: EvidenceModel, options: Row, dense_layers: tuple[int, ...]) -> Iterator[None]:
    """With VSA as `options` say, or dense where there are none."""
    if not options:
        yield
        return
    enable_vsa(model.transformer, dense_layers=dense_layers, **options)
    try:
        yield
    finally:
        disable_vsa(model.transformer)


@contextmanager
def kept_shares(transformer: torch.nn.Module) -> Iterator[list[float]]:
    """Collects, for every forward, the share of key tiles that a sparse module keeps; 1 where it runs dense."""
    shares: list[float] = []
    attn = transformer.blocks[-1].attn1

    def note(module: torch.nn.Module, args: Any) -> None:
        state = getattr(module.processor, "state", None)
        if state is None or state.dense_step:
            shares.append(1.0)
        else:
            shares.append(state.kept / TileGrid(state.video_shape, state.block_size).num_tiles)

    handle = attn.register_forward_pre_hook(note)
    try:
        yield shares
    finally:
        handle.remove()


def make_videos(
    model: EvidenceModel, grid: str, steps: int, pairs: list[int], options: Row, dense_layers: tuple[int, ...]
) -> tuple[torch.Tensor, float]:
    """Videos of a batch of pairs, `[pairs, 3, frames, height, width]` in [-1, 1], and the mean share kept."""
    embeds, negative = model.prompts(pairs)
    noise = model.noise(pairs, grid_of(grid))
    with attending(model, options, dense_layers), kept_shares(model.transformer) as shares:
        latents = sample(model.transformer, model.scheduler, noise, embeds, steps, negative, model.guidance)
    return model.decode(latents), math.fsum(shares) / len(shares)


def row_of(video: torch.Tensor, reference: torch.Tensor, right: bool | None) -> Row:
    """What one video is worth; videos are `[3, frames, height, width]` in [-1, 1]."""
    frames, dense = ((each.transpose(0, 1) + 1) / 2 for each in (video, reference))
    psnr = float(peak_signal_noise_ratio(frames, dense, data_range=1.0))
    ssim = float(structural_similarity_index_measure(frames, dense, data_range=1.0))
    return {"psnr": min(psnr, -10 * math.log10(LEAST_MSE)), "ssim": ssim, "right": right}


def measure(
    model: EvidenceModel, evidence: Evidence, grid: str, steps: int, pairs: list[int], dense_layers: tuple[int, ...]
) -> Iterator[None]:
    """Yield before each variant, and then add what is missing of it for a batch of pairs."""
    reference: torch.Tensor | None = None
    for family, variants in VARIANTS.items():
        for name, options in variants.items():
            yield
            todo = evidence.missing_pairs(grid, steps, family, name, pairs)
            if todo:
                if reference is None:
                    reference = make_videos(model, grid, steps, pairs, {}, dense_layers)[0]
                videos, kept = reference, 1.0
                if options:
                    videos, kept = make_videos(model, grid, steps, pairs, options, dense_layers)
                for pair, video, dense in zip(pairs, videos, reference, strict=True):
                    if pair in todo:
                        row = {"grid": grid, "steps": steps, "family": family, "name": name, "pair": pair, "kept": kept}
                        evidence.rows.append(row | row_of(video, dense, model.is_right(video, pair)))
                evidence.save()


class HeldOut:
    """Clean latents and noise `[videos, ...]`, and the levels in the middle of `LEVELS` equal parts of a run.

    Args:
        model: what they are for.
        grid: of tokens.
        count: of videos.
    """

    def __init__(self, model: EvidenceModel, grid: tuple[int, int, int], count: int):
        self.transformer = model.transformer
        self.clean, self.embeds = model.held_out(grid, count)
        self.noise = torch.randn(self.clean.shape, generator=torch.Generator().manual_seed(0)).to(self.clean)
        self.shares = (torch.arange(LEVELS) + 0.5) / LEVELS
        self.sigmas = shift_sigmas(1 - self.shares, model.scheduler.config.flow_shift).to(self.clean)

    @torch.no_grad()
    def predicted(self, rows: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """The transformer's velocity for some of the videos at one level, fp32."""
        levels, dtype = sigma.expand(len(rows)), self.transformer.dtype
        noisy = add_noise(self.clean[rows], self.noise[rows], levels).to(dtype)
        return self.transformer(noisy, 1000 * levels, self.embeds[rows].to(dtype), return_dict=False)[0].float()


@torch.no_grad()
def measure_losses(
    model: EvidenceModel, evidence: Evidence, grid: str, count: int, batch_size: int, dense_layers: tuple[int, ...]
) -> None:
    """Put in place rows by share of the run, ratio and held-out video: loss, and distance from the dense prediction.

    Distance is the squared error between both predictions, in shares of the dense one's mean square. The levels are
    those in the middle of `LEVELS` equal parts of a run.
    """
    evidence.losses = [row for row in evidence.losses if row["grid"] != grid]
    held_out = HeldOut(model, grid_of(grid), count)
    clean, noise = held_out.clean, held_out.noise
    for rows in torch.arange(count, device=clean.device).split(batch_size):
        for share, sigma in zip(held_out.shares.tolist(), held_out.sigmas, strict=True):
            dense = held_out.predicted(rows, sigma)
            for ratio in (1.0, *MEANS):
                options = {} if ratio == 1 else VARIANTS["constant"][f"{ratio:g}"]
                with attending(model, options, dense_layers):
                    ours = held_out.predicted(rows, sigma) if options else dense
                losses = velocity_error(ours, clean[rows], noise[rows])
                distances = (ours - dense).square().flatten(1).mean(1) / dense.square().flatten(1).mean(1)
                about = {"grid": grid, "share": share, "sigma": sigma.item(), "ratio": ratio}
                evidence.losses += [
                    about | {"video": video, "loss": loss, "distance": distance}
                    for video, loss, distance in zip(
                        rows.tolist(), losses.tolist(), distances.tolist(), strict=True
                    )
                ]  # fmt: skip
    evidence.save()


def with_gains(rows: list[Row]) -> list[Row]:
    """The same rows with those of `GAINS`, in dB; `None` where no two ratios of the pair enclose the share kept."""
    curves: dict[tuple[str, int, int, str], list[tuple[float, float]]] = {}
    for row in rows:
        if row["family"] in GAINS.values():
            curves.setdefault((*_pair(row), row["family"]), []).append((row["kept"], row["psnr"]))
    return [
        row | {gain: _gain(row, sorted(curves.get((*_pair(row), base), [])), base) for gain, base in GAINS.items()}
        for row in rows
    ]


def _pair(row: Row) -> tuple[str, int, int]:
    return row["grid"], row["steps"], row["pair"]


def _gain(row: Row, curve: list[tuple[float, float]], base: str) -> float | None:
    if row["family"] in ("dense", base):
        return None
    for (x0, y0), (x1, y1) in itertools.pairwise(curve):
        if x0 <= row["kept"] <= x1 and x0 < x1:
            return row["psnr"] - (y0 + (y1 - y0) * (row["kept"] - x0) / (x1 - x0))
    return None


def mean_and_error(values: list[float]) -> tuple[float, float | None]:
    numbers = torch.tensor(values, dtype=torch.float64)
    return numbers.mean().item(), numbers.std().item() / math.sqrt(len(values)) if len(values) > 1 else None


def _grouped(rows: list[Row], names: tuple[str, ...]) -> dict[tuple[Any, ...], list[Row]]:
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups


def summary(rows: list[Row]) -> list[Row]:
    """Means over pairs, with standard errors, of every variant on every grid at every number of steps."""
    found = []
    for key, group in _grouped(with_gains(rows), _VARIANT).items():
        summed: Row = dict(zip(_VARIANT, key, strict=True)) | {"pairs": len(group)}
        summed["kept"] = math.fsum(row["kept"] for row in group) / len(group)
        for measure_ in MEASURES:
            values = [float(row[measure_]) for row in group if row[measure_] is not None]
            if len(values) == len(group):
                summed[measure_], summed[f"{measure_}_standard_error"] = mean_and_error(values)
        found.append(summed)
    return found


def loss_summary(losses: list[Row]) -> list[Row]:
    """Per grid, share of the run and ratio: mean loss, what is added to the dense one's mean, and mean distance."""
    found = []
    groups = _grouped(losses, ("grid", "share", "sigma", "ratio"))
    for (grid, share, sigma, ratio), group in groups.items():
        dense = {row["video"]: row["loss"] for row in groups[grid, share, sigma, 1.0]}
        level = math.fsum(dense.values()) / len(dense)
        row: Row = {"grid": grid, "share": share, "sigma": sigma, "ratio": ratio, "videos": len(group)}
        row["loss"] = math.fsum(each["loss"] for each in group) / len(group)
        added = [(each["loss"] - dense[each["video"]]) / level for each in group]
        row["added"], row["added_standard_error"] = mean_and_error(added)
        row["distance"], row["distance_standard_error"] = mean_and_error([each["distance"] for each in group])
        found.append(row)
    return found


def _cell(row: Row, name: str, digits: int, signed: bool = False) -> str:
    if name not in row:
        return ""
    error = row[f"{name}_standard_error"]
    return f"{row[name]:{'+' if signed else ''}.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def print_tables(found: list[Row], losses: list[Row]) -> None:
    console = Console(width=130)
    for (grid, steps), own in _grouped(found, ("grid", "steps")).items():
        table = Table(title=f"{grid} tokens, {steps} steps, {own[0]['pairs']} pairs of prompt and seed: mean ± "
                            "standard error")  # fmt: skip
        judged = any("right" in row for row in own)
        for column in (
            "schedule",
            "",
            "kept",
            "PSNR, dB",
            "SSIM",
            "gain, dB",
            "over front, dB",
            *["captions right"] * judged,
        ):
            table.add_column(column)
        for row in own:
            cells = [_cell(row, "psnr", 2), _cell(row, "ssim", 4)]
            cells += [_cell(row, gain, 2, signed=True) for gain in GAINS]
            if row["family"] == "dense":
                cells = [""] * len(cells)
            cells += [_cell(row, "right", 2)] * judged
            table.add_row(row["family"], row["name"], f"{row['kept']:.3f}", *cells)
        console.print(table)
    for (grid,), own in _grouped(losses, ("grid",)).items():
        table = Table(title=f"{grid} tokens, {own[0]['videos']} held-out videos: what a ratio adds to the dense loss, "
                            "and in brackets the distance to the dense prediction, both in %")  # fmt: skip
        ratios = [row["ratio"] for row in own if row["share"] == own[0]["share"] and row["ratio"] != 1]
        for column in ("share of the run", "noise level", "dense loss", *(f"{ratio:g}" for ratio in ratios)):
            table.add_column(column)
        for level in _grouped(own, ("share",)).values():
            by_ratio = {row["ratio"]: row for row in level}
            first = by_ratio[1.0]
            cells = [
                f"{100 * by_ratio[each]['added']:+.1f} ({100 * by_ratio[each]['distance']:.1f})" for each in ratios
            ]
            table.add_row(f"{first['share']:.2f}", f"{first['sigma']:.3f}", f"{first['loss']:.4f}", *cells)
        console.print(table)


def draw(found: list[Row], losses: list[Row], path: Path) -> None:
    """One row of panels for each grid: PSNR against the share kept, by number of steps; and loss by share of run."""
    grids = list(dict.fromkeys(row["grid"] for row in (*found, *losses)))
    counts = list(dict.fromkeys(row["steps"] for row in found))
    size = (5 * (len(counts) + 1), 4 * len(grids))
    figure, panels = plt.subplots(len(grids), len(counts) + 1, figsize=size, squeeze=False)
    for line, grid in zip(panels, grids, strict=True):
        for panel, steps in zip(line, counts, strict=False):
            for family in (family for family in VARIANTS if family != "dense"):
                own = sorted((row["kept"], row["psnr"], row["psnr_standard_error"] or 0.0) for row in found
                             if (row["grid"], row["steps"], row["family"]) == (grid, steps, family))  # fmt: skip
                if own:
                    kept, psnr, error = zip(*own, strict=True)
                    form = "-o" if family in ("constant", "front") else "o"
                    panel.errorbar(kept, psnr, error, fmt=form, label=family, capsize=2)
                    panel.legend()
            panel.set(title=f"{grid}, {steps} steps", xlabel="mean share of key tiles kept", ylabel="PSNR to dense, dB")
        for (ratio,), own in _grouped([row for row in losses if row["grid"] == grid], ("ratio",)).items():
            if ratio != 1:
                share, distance, error = zip(
                    *((row["share"], row["distance"], row["distance_standard_error"] or 0.0) for row in own),
                    strict=True,
                )
                line[-1].errorbar(share, distance, error, fmt="-o", label=f"{ratio:g}", capsize=2)
                line[-1].set(yscale="log")
                line[-1].legend(title="constant ratio")
        line[-1].set(title=f"{grid}, held-out videos", xlabel="share of the run", ylabel="distance to dense prediction")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def grid_of(text: str) -> tuple[int, int, int]:
    parts = text.split("x")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) for part in parts):
        raise typer.BadParameter(f"--grids has {text!r}, which must be frames x height x width in tokens: 16x32x32.")
    t, h, w = map(int, parts)
    return t, h, w


def _numbers(option: str, text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"{option} has {text!r}, which must be whole numbers with commas: 20,8.") from error


@warnings_only()  # VSA is enabled many times
def main(
    model: Annotated[
        Path,
        typer.Option(help="Folder of the tiny Wan pipeline or of a clips model.", exists=True, file_okay=False),
    ] = MODEL,
    pairs: Annotated[int, typer.Option(help="Pairs of a prompt and a seed.", min=1)] = 16,
    steps: Annotated[str, typer.Option(help="Numbers of denoising steps.")] = "20,50,8,4",
    grids: Annotated[
        str, typer.Option(help="Grids of tokens, such as 16x32x32,32x32x32; as the model was trained, if left out.")
    ] = "",
    held_out: Annotated[int, typer.Option(help="Held-out videos for the losses; 0 leaves them out.", min=0)] = 12,
    batch_size: Annotated[int, typer.Option(help="Videos made at once.", min=1)] = 8,
    dense_layers: Annotated[str, typer.Option(help="Layers that stay dense, such as 0 or 0,-1.")] = "",
    minutes: Annotated[
        float, typer.Option(help="Begin nothing later than this; 0 only reports what there is.")
    ] = math.inf,
    device: Annotated[str, typer.Option(help="Where to run.")] = "cuda" if torch.cuda.is_available() else "cpu",
    json_path: Annotated[Path | None, typer.Option("--json", help="Keep every row here, and go on from it.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw PSNR against the share kept, and losses.")] = None,
) -> None:
    """Print the tables."""
    ends = time.monotonic() + 60 * minutes
    judged = load_evidence_model(model, torch.device(device))
    counts = _numbers("--steps", steps)
    if min(counts) < 1:
        raise typer.BadParameter(f"--steps has {steps!r}, where every number must be 1 or more.")
    names = grids.split(",") if grids else ["x".join(map(str, judged.usual_grid))]
    layers = tuple(_numbers("--dense-layers", dense_layers)) if dense_layers else ()
    for name in names:
        grid_of(name)
    where = torch.cuda.get_device_name() if device.startswith("cuda") else device
    about = {"model": judged.name, "described": judged.described, "dense_layers": list(layers), "device": where}
    evidence = Evidence(json_path, about)
    batches = [list(range(first, min(first + batch_size, pairs))) for first in range(0, pairs, batch_size)]
    todo = [(name, count, batch) for count in counts for name in names for batch in batches]
    console = Console(width=130)
    console.print(f"{judged.described} {pairs} pairs and {held_out} held-out videos are few: mind the standard errors.")
    with Progress(console=console) as progress:
        task = progress.add_task("Losses", total=len(names))
        for name in names if held_out else ():
            if time.monotonic() < ends and evidence.videos_judged(name) < held_out:
                measure_losses(judged, evidence, name, held_out, batch_size, layers)
            progress.advance(task)
        task = progress.add_task("Videos", total=len(todo) * sum(map(len, VARIANTS.values())))
        begun = (None for name, count, batch in todo for _ in measure(judged, evidence, name, count, batch, layers))
        for _ in begun:
            if time.monotonic() > ends:
                break
            progress.advance(task)
    found, losses = summary(evidence.rows), loss_summary(evidence.losses)
    print_tables(found, losses)
    if plot is not None and (found or losses):
        draw(found, losses, plot)


if __name__ == "__main__":
    run_script(main)
