"""Where in a run tiles are best spent: videos of the tiny Wan model under many schedules, against the dense ones.

    PYTHONPATH=examples/training python examples/research/schedule_evidence.py --pairs 16 --steps 20,50,8,4 \
        --json evidence.json --plot evidence.png

The stock pipeline with its own scheduler and guidance, and its first layer dense. Every pair is a held-out caption with
a seed of its own. PSNR and SSIM compare a video with the dense one of the same pair; a caption is right if a detector
sees all that it names. The share of tiles kept is what the processors kept, dense steps included. With --json the pairs
that are done are kept, and a run that was interrupted goes on after them.
"""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import typer
from caption_detector import detect
from diffusers import WanPipeline
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from tiny_wan_evaluation import generate, held_out_captions
from vsa_diffusers import RatioSchedule, disable_vsa, enable_vsa
from vsa_diffusers.cli.script import run_script
from vsa_diffusers.files import replaced_file
from vsa_diffusers.tiles import TileGrid

MODEL = Path(__file__).parents[1] / "tiny_wan"
LEAST_MSE = 1e-10  # of videos that are the same, so that their PSNR is a number
CAPTIONS = 16
MEANS = (0.125, 0.2, 0.25, 0.3, 0.375, 0.5)


def _ramp(first: float, last: float, power: float) -> tuple[str, dict[str, Any]]:
    return f"{first:g} to {last:g}, power {power:g}", {"schedule": RatioSchedule.ramp(first, last, power)}


# By family and name, what enable_vsa is given.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
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
Row = dict[str, Any]


@contextmanager
def kept_shares(pipe: WanPipeline) -> Iterator[list[float]]:
    """Collects, for every forward, the share of key tiles that a sparse module keeps; 1 where it runs dense."""
    shares: list[float] = []
    attn = pipe.transformer.blocks[-1].attn1

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


def measure(pipe: WanPipeline, pair: int, steps: int, call: Row, progress: Any) -> list[Row]:
    """A row for the dense video of a pair, and one for each variant."""
    captions = held_out_captions(CAPTIONS)
    caption = captions[pair % CAPTIONS]
    reference = generate(pipe, caption.caption, pair, num_inference_steps=steps, **call)
    progress()
    rows = [row_of("dense", "", reference, reference, 1.0, caption)]
    for family, variants in VARIANTS.items():
        for name, options in variants.items():
            enable_vsa(pipe, dense_layers=(0,), **options)
            with kept_shares(pipe) as shares:
                video = generate(pipe, caption.caption, pair, num_inference_steps=steps, **call)
            disable_vsa(pipe)
            rows.append(row_of(family, name, video, reference, math.fsum(shares) / len(shares), caption))
            progress()
    return [{"pair": pair, "steps": steps, "caption": caption.caption} | row for row in rows]


def row_of(family: str, name: str, video: torch.Tensor, reference: torch.Tensor, kept: float, caption: Any) -> Row:
    """What one video is worth; videos are `[3, frames, height, width]` in [-1, 1]."""
    frames, dense = ((each.transpose(0, 1) + 1) / 2 for each in (video, reference))
    psnr = float(peak_signal_noise_ratio(frames, dense, data_range=1.0))
    ssim = float(structural_similarity_index_measure(frames, dense, data_range=1.0))
    return {
        "family": family,
        "name": name,
        "kept": kept,
        "psnr": min(psnr, -10 * math.log10(LEAST_MSE)),
        "ssim": ssim,
        "right": all(detect(video).agrees(caption).values()),
    }


def summary(rows: list[Row]) -> list[Row]:
    """Means over pairs, with standard errors, of every variant at every number of steps."""
    groups: dict[tuple[int, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["steps"], row["family"], row["name"]), []).append(row)
    found = []
    for (steps, family, name), group in groups.items():
        summed: Row = {"steps": steps, "family": family, "name": name, "pairs": len(group)}
        summed["kept"] = sum(row["kept"] for row in group) / len(group)
        for measure_ in ("psnr", "ssim", "right"):
            values = torch.tensor([float(row[measure_]) for row in group])
            summed[measure_] = values.mean().item()
            error = values.std().item() / math.sqrt(len(group)) if len(group) > 1 else None
            summed[f"{measure_}_standard_error"] = error
        found.append(summed)
    return found


def print_table(found: list[Row]) -> None:
    for steps in dict.fromkeys(row["steps"] for row in found):
        own = [row for row in found if row["steps"] == steps]
        table = Table(title=f"{steps} steps, {own[0]['pairs']} pairs of caption and seed: mean ± standard error")
        for column in ("schedule", "", "kept", "PSNR, dB", "SSIM", "captions right"):
            table.add_column(column)
        for row in own:
            cells = [
                f"{row[name]:.{digits}f}"
                + ("" if row[f"{name}_standard_error"] is None else f" ± {row[f'{name}_standard_error']:.{digits}f}")
                for name, digits in (("psnr", 2), ("ssim", 4), ("right", 2))
            ]
            if row["family"] == "dense":
                cells[:2] = "", ""
            table.add_row(row["family"], row["name"], f"{row['kept']:.3f}", *cells)
        Console(width=120).print(table)


def draw(found: list[Row], path: Path) -> None:
    """PSNR against the share of tiles kept, one panel for each number of steps."""
    counts = list(dict.fromkeys(row["steps"] for row in found))
    figure, panels = plt.subplots(1, len(counts), figsize=(5 * len(counts), 4), squeeze=False)
    for panel, steps in zip(panels[0], counts, strict=True):
        for family in VARIANTS:
            own = sorted((row["kept"], row["psnr"], row["psnr_standard_error"] or 0.0) for row in found
                         if row["steps"] == steps and row["family"] == family)  # fmt: skip
            kept, psnr, error = zip(*own, strict=True)
            line = "-o" if family in ("constant", "front") else "o"
            panel.errorbar(kept, psnr, error, fmt=line, label=family, capsize=2)
        panel.set(title=f"{steps} steps", xlabel="mean share of key tiles kept", ylabel="PSNR to the dense video, dB")
        panel.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(
    model: Annotated[
        Path, typer.Option(help="Directory of the tiny Wan pipeline.", exists=True, file_okay=False)
    ] = MODEL,
    pairs: Annotated[int, typer.Option(help="Pairs of a held-out caption and a seed.")] = 16,
    steps: Annotated[str, typer.Option(help="Numbers of denoising steps.")] = "20,50,8,4",
    height: Annotated[int, typer.Option(help="Of the videos.")] = 256,
    width: Annotated[int, typer.Option(help="Of the videos.")] = 256,
    num_frames: Annotated[int, typer.Option(help="Of the videos.")] = 61,
    device: Annotated[str, typer.Option(help="Where to run.")] = "cuda" if torch.cuda.is_available() else "cpu",
    json_path: Annotated[Path | None, typer.Option("--json", help="Keep every row here, and go on from it.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw PSNR against the share kept.")] = None,
) -> None:
    """Print the table."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    pipe = WanPipeline.from_pretrained(model, dtype=dtype).to(device)
    pipe.set_progress_bar_config(disable=True)
    call = {"height": height, "width": width, "num_frames": num_frames}
    rows: list[Row] = []
    if json_path is not None and json_path.exists():
        kept = json.loads(json_path.read_text())
        if kept["call"] != call | {"device": kept["call"]["device"]}:
            raise typer.BadParameter(f"{json_path} is of {kept['call']}; give another file, or the same sizes.")
        rows = kept["rows"]
    done = {(row["pair"], row["steps"]) for row in rows}
    todo = [(pair, int(count)) for count in steps.split(",") for pair in range(pairs) if (pair, int(count)) not in done]
    videos = 1 + sum(map(len, VARIANTS.values()))
    name = torch.cuda.get_device_name() if device.startswith("cuda") else device
    with Progress() as progress:
        task = progress.add_task("Videos", total=len(todo) * videos)
        for pair, count in todo:
            rows += measure(pipe, pair, count, call, lambda: progress.advance(task))
            if json_path is not None:
                with replaced_file(json_path) as partial:
                    partial.write_text(json.dumps({"call": call | {"device": name}, "rows": rows}, indent=1) + "\n")
    found = summary(rows)
    print_table(found)
    if plot is not None:
        draw(found, plot)


if __name__ == "__main__":
    run_script(main)
