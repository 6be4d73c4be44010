"""`vsa-diffusers tune`: the settings that reach a target."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from . import options
from .output import answers, print_json
from .progress import progress_bars

TARGET, SEARCH = "The target, one of them", "The search"
MISSED = 1
"""Exit status where no setting reaches the target."""


def tune(
    model: options.Model,
    prompts: Annotated[list[str], typer.Argument(help="What to tune by; a few, unlike.", metavar="PROMPT...")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Where everything is written.", file_okay=False)
    ] = Path("tuning"),
    psnr: Annotated[
        float | None, typer.Option(help="Least PSNR to the dense videos, in dB, at least cost.", rich_help_panel=TARGET)
    ] = None,
    ssim: Annotated[
        float | None, typer.Option(help="Least SSIM to the dense videos, at least cost.", rich_help_panel=TARGET)
    ] = None,
    error: Annotated[
        float | None,
        typer.Option(help="Largest relative error of the transformer's output, at least cost.", rich_help_panel=TARGET),
    ] = None,
    speedup: Annotated[
        float | None,
        typer.Option(help="Times as fast as dense in denoising, at best quality.", rich_help_panel=TARGET),
    ] = None,
    schedule: Annotated[
        list[str] | None,
        typer.Option(help="Schedules to try: constant, ramp, front, steep, dense start; all.", rich_help_panel=SEARCH),
    ] = None,
    block_size: Annotated[
        list[str] | None,
        typer.Option(help="Blocks to choose from, such as auto 4x4x4 2x8x4; auto and 4x4x4.", rich_help_panel=SEARCH),
    ] = None,
    selection: Annotated[
        list[str] | None,
        typer.Option(help="What tiles are ranked by, to choose from: quarters, mean; both.", rich_help_panel=SEARCH),
    ] = None,
    rounds: Annotated[
        int,
        typer.Option(
            min=0,
            help="Budgets that make whole videos at most, before schedules are compared and after.",
            rich_help_panel=SEARCH,
        ),
    ] = 3,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure",
            help="Count times of layers as costs where they are stable here, not tiles.",
            rich_help_panel=SEARCH,
        ),
    ] = False,
    anew: Annotated[
        bool, typer.Option("--anew", help="Forget what was measured of the layers.", rich_help_panel=SEARCH)
    ] = False,
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
    as_json: options.Json = False,
) -> None:
    """Find the settings that reach a quality, or a speed.

    Say what is wanted; it finds how many tiles each layer keeps at each step, which layers stay dense, block and
    selection:

        vsa-diffusers tune examples/tiny_wan "a red disc moves left over blue waves" --psnr 30 --frames 29 --steps 12

        vsa-diffusers generate examples/tiny_wan "a small ring moves up" --config tuning/config.json

    First, layers are measured on a few steps of a dense run, which takes about as long as a few videos. Then whole
    videos decide between schedules and budgets: ten to fifteen for each prompt. Tune with as many steps as you will
    use: schedules are followed by them.

    Into the output directory: config.json, which `generate --config` and `enable_vsa(config=...)` take; report.html,
    with quality against cost; results.json; and videos/, which compares all settings. The same command goes on after an
    interruption, and with another target makes only what is new. Where nothing reaches the target there is no
    config.json, and the exit status is 1.
    """
    from ..generation.sparsity import read_value
    from ..tuning.api import BLOCKS
    from ..tuning.load import tune_model
    from ..tuning.report import table, verdict
    from ..tuning.search import SHAPES

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
    with progress_bars() as progress:
        tuning = tune_model(
            model,
            prompts,
            output,
            psnr=psnr,
            ssim=ssim,
            error=error,
            speedup=speedup,
            schedules=schedule or list(SHAPES),
            blocks=[read_value("block_size", text) for text in block_size or []] or BLOCKS,
            selections=selection or ["quarters", "mean"],
            rounds=rounds,
            measure=measure,
            anew=anew,
            arguments=arguments,
            seed=seed,
            fps=fps,
            dtype=dtype,
            device=device,
            offload=offload,
            compile=compile,
            lora=lora,
            progress=progress,
            command=shlex.join(["vsa-diffusers", *sys.argv[1:]]),
        )
    if as_json:
        print_json(tuning.to_dict())
    else:
        answers.print(table(tuning))
        answers.print(verdict(tuning), highlight=False, markup=False)
        answers.print(f"Open {output / 'report.html'}", highlight=False, markup=False, soft_wrap=True)
    if not tuning.is_met:
        raise typer.Exit(MISSED)
