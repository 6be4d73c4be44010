"""`vsa-diffusers compare`: dense and sparse videos beside each other."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from . import options
from .options import SPARSITY
from .output import answers, print_json
from .progress import progress_bars

RATIOS = (0.5, 0.25)


def compare(
    model: options.Model,
    prompts: Annotated[list[str], typer.Argument(help="What to show; several give means.", metavar="PROMPT...")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Where everything is written.", file_okay=False)
    ] = Path("comparison"),
    ratio: Annotated[
        list[float] | None,
        typer.Option(help="Shares of key tiles to compare.", rich_help_panel=SPARSITY),
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=...",
            help="A setting of its own: NAME=ratio=0.2,dense_steps=0.1,block_size=auto, or NAME=FILE of settings; may "
            "be repeated.",
            rich_help_panel=SPARSITY,
        ),
    ] = None,
    block_size: options.BlockSize = None,
    schedule: options.Schedule = None,
    dense_steps: options.DenseSteps = None,
    dense_layers: options.DenseLayers = None,
    negative_prompt: options.NegativePrompt = None,
    height: options.Height = None,
    width: options.Width = None,
    frames: options.Frames = None,
    steps: options.Steps = None,
    guidance_scale: options.GuidanceScale = None,
    seed: options.Seed = None,
    fps: options.FramesPerSecond = None,
    image: options.Image = None,
    more: options.More = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    offload: options.Offload = "none",
    compile: options.Compile = False,
    lora: options.Lora = None,
    gates: options.Gates = None,
    anew: Annotated[bool, typer.Option("--anew", help="Make again what an earlier comparison kept.")] = False,
    as_json: options.Json = False,
) -> None:
    """See what sparse attention gains, and what it costs.

    Makes the same video dense and with each setting, from the same noise, and writes a page that plays them side by
    side, with times, memory, PSNR and SSIM:

        vsa-diffusers compare examples/tiny_wan "a red circle moves to the right" --frames 29 --steps 12

    The model is tiny, and ships with the source: that needs no GPU. Without `--ratio` and `--setting`, 0.5 and 0.25
    are compared.
    `--block-size`, `--schedule`, `--dense-steps` and `--dense-layers` count for all ratios.

    Into the output directory: report.html (one file that holds everything it shows), results.json, contact_sheet.png,
    an mp4 per setting, and in frames/ what a later call need not make again; after an interruption it goes on there.
    """
    from ..comparison.load import compare_model

    changes = options.sparse_fields(
        block_size=block_size, schedule=schedule, dense_steps=dense_steps, dense_layers=dense_layers
    )
    arguments = options.call_options(
        more,
        negative_prompt=negative_prompt,
        height=height,
        width=width,
        num_frames=frames,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        image=image,
    )
    ratios = list(RATIOS) if not ratio and not setting else list(ratio or [])
    with progress_bars() as progress:
        comparison = compare_model(
            model,
            prompts,
            output,
            ratios=ratios,
            settings=setting or [],
            changes=changes,
            arguments=arguments,
            seed=seed,
            fps=fps,
            dtype=dtype,
            device=device,
            offload=offload,
            compile=compile,
            lora=lora,
            gates=gates,
            reuse=not anew,
            progress=progress,
            command=shlex.join(["vsa-diffusers", *sys.argv[1:]]),
        )
    if as_json:
        print_json(comparison.to_dict())
        return
    answers.print(comparison.table())
    if comparison.hint is not None:
        answers.print(comparison.hint, highlight=False, markup=False)
    if comparison.no_distance is not None:
        answers.print(f"No LPIPS: {comparison.no_distance}.", highlight=False, markup=False)
    answers.print(f"Open {output / 'report.html'}", highlight=False, markup=False, soft_wrap=True)
