"""`vsa-diffusers generate`: one video."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from . import options
from .options import SPARSITY
from .output import answers, print_json, tell
from .progress import progress_bars


def generate(
    model: options.Model,
    prompt: Annotated[str, typer.Argument(help="What to show.", metavar="PROMPT")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The video file.")] = Path("video.mp4"),
    ratio: Annotated[
        float | None,
        typer.Option(help="Share of key tiles kept, lower is faster (default 0.5).", rich_help_panel=SPARSITY),
    ] = None,
    top_k: options.TopK = None,
    block_size: options.BlockSize = None,
    schedule: options.Schedule = None,
    dense_steps: options.DenseSteps = None,
    dense_layers: options.DenseLayers = None,
    config: Annotated[
        Path | None,
        typer.Option(help="Settings: a directory with vsa_config.json, or a JSON file.", rich_help_panel=SPARSITY),
    ] = None,
    vsa: Annotated[
        str | None,
        typer.Option(help="What save_vsa wrote: fine-tuned weights and settings.", rich_help_panel=SPARSITY),
    ] = None,
    dense: Annotated[bool, typer.Option("--dense", help="Without VSA.", rich_help_panel=SPARSITY)] = False,
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
    guidance_parallel: Annotated[
        bool,
        typer.Option(
            "--guidance-parallel",
            help="Under torchrun: two groups of processes, one for each of guidance's predictions.",
            rich_help_panel="The model",
        ),
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Make a video, faster.

    Loads any supported diffusers pipeline, makes its video self-attention sparse, and writes an mp4, with sound where
    the model makes it:

        vsa-diffusers generate Wan-AI/Wan2.1-T2V-1.3B-Diffusers "A cat walks on the grass." --ratio 0.3

    A setting is a trade: `compare` shows what it costs. Start with `--ratio 0.5`, or `--ratio 0.2 --dense-steps 0.2`.
    A model folder may recommend arguments in a file recommended.json; options override them.

    Several GPUs make one video together: `torchrun --nproc-per-node 2 -m vsa_diffusers generate MODEL PROMPT ...`
    """
    from ..generation.generate import generate as make
    from ..generation.processes import is_first, is_one_of_several, joined_processes

    changes = options.sparse_fields(
        top_k_ratio=ratio,
        top_k=top_k,
        block_size=block_size,
        schedule=schedule,
        dense_steps=dense_steps,
        dense_layers=dense_layers,
    )
    arguments = options.call_options(
        more,
        prompt=prompt,
        negative_prompt=negative_prompt,
        height=height,
        width=width,
        num_frames=frames,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        image=image,
    )
    with joined_processes(tell=tell) if is_one_of_several() else nullcontext() as own_device:
        with progress_bars(show=is_first()) as progress:
            made = make(
                model,
                output,
                arguments,
                seed=seed,
                fps=fps,
                dense=dense,
                changes=changes,
                config=config,
                vsa=vsa,
                lora=lora,
                gates=gates,
                dtype=dtype,
                device=device if own_device is None else str(own_device),
                offload=offload,
                compile=compile,
                guidance_parallel=guidance_parallel,
                progress=progress,
            )
        if not is_first():
            return
        count, tall, wide, _ = made.video.frames.shape
        numbers = {"output": str(made.path), "frames": count, "height": tall, "width": wide, "fps": made.video.fps}
        numbers |= {"audio": made.video.audio is not None, "seconds": made.seconds}
        if as_json:
            print_json(numbers)
        else:
            sound = ", with sound" if made.video.audio is not None else ""
            answers.print(
                f"{made.path}: {count} frames of {wide}x{tall}, {made.video.fps:g} per second{sound}, "
                f"in {made.seconds:.1f} s.",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )
