"""`vsa-diffusers inspect`: what sparse attention keeps and loses, layer by layer."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from . import options
from .options import SPARSITY
from .output import answers
from .progress import progress_bars

MEASURED = "What is measured"


def inspect(
    model: options.Model,
    prompt: Annotated[str, typer.Argument(help="What to show.", metavar="PROMPT")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Where everything is written.", file_okay=False)
    ] = Path("inspection"),
    ratio: Annotated[
        float | None, typer.Option(help="Share of key tiles kept (default 0.2).", rich_help_panel=SPARSITY)
    ] = None,
    top_k: options.TopK = None,
    block_size: options.BlockSize = None,
    combine: Annotated[
        str | None, typer.Option(help="merge, gate, sparse, sum or auto.", rich_help_panel=SPARSITY)
    ] = None,
    selection: Annotated[
        str | None, typer.Option(help="What tiles are ranked by: mean, quarters or auto.", rich_help_panel=SPARSITY)
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="Layers to measure, such as 0,5,-1; all of them.", rich_help_panel=MEASURED)
    ] = None,
    at_steps: Annotated[
        str,
        typer.Option(
            help="Denoising steps to measure: a list such as 0,5,-1, or a number (4) of steps spread evenly; 0, is "
            "the first step alone.",
            rich_help_panel=MEASURED,
        ),
    ] = "4",
    query: Annotated[
        str | None,
        typer.Option(
            metavar="T,H,W", help="Token whose kept tiles are drawn; the one in the middle.", rich_help_panel=MEASURED
        ),
    ] = None,
    query_tiles: Annotated[
        int, typer.Option(min=1, help="Query tiles that are measured exactly.", rich_help_panel=MEASURED)
    ] = 16,
    negative_prompt: options.NegativePrompt = None,
    height: options.Height = None,
    width: options.Width = None,
    frames: options.Frames = None,
    steps: options.Steps = None,
    guidance_scale: options.GuidanceScale = None,
    seed: options.Seed = None,
    image: options.Image = None,
    more: options.More = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    offload: options.Offload = "none",
    lora: options.Lora = None,
    gates: options.Gates = None,
    as_json: options.Json = False,
) -> None:
    """See what sparse attention keeps, and which layers ask to stay dense.

    Makes one video densely. At some steps every layer runs its sparse attention beside the dense one, so that each is
    judged by itself: how much of the attention mass the kept tiles hold, how wrong the output is, and how many tiles
    would do:

        vsa-diffusers inspect examples/tiny_wan "a red circle moves to the right" --ratio 0.125

    Into the output directory: report.html (one file that holds everything it shows), inspection.json, and its pictures
    as PNG. `compare` shows what the settings then do to the video.
    """
    from ..inspection.load import inspect_model
    from ..inspection.report import table

    changes = options.sparse_fields(
        top_k_ratio=ratio, top_k=top_k, block_size=block_size, combine=combine, selection=selection
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
    with progress_bars() as progress:
        inspection = inspect_model(
            model,
            prompt,
            output,
            changes=changes,
            layers=None if layers is None else _numbers("--layers", layers),
            steps=_steps(at_steps),
            query=None if query is None else _numbers("--query", query),
            query_tiles=query_tiles,
            arguments=arguments,
            seed=seed,
            dtype=dtype,
            device=device,
            offload=offload,
            lora=lora,
            gates=gates,
            command=shlex.join(["vsa-diffusers", *sys.argv[1:]]),
            progress=progress,
        )
    if as_json:
        typer.echo(json.dumps(inspection.to_dict(), indent=2))
        return
    answers.print(table(inspection))
    answers.print(inspection.advice, highlight=False, markup=False)
    answers.print(f"Open {output / 'report.html'}", highlight=False, markup=False, soft_wrap=True)


def _numbers(option: str, text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",") if number.strip()]
    except ValueError as error:
        raise ValueError(f"{option} {text!r} must be whole numbers with commas between them, such as 0,5,9.") from error


def _steps(text: str) -> int | list[int]:
    """A number of steps, or with a comma their own numbers."""
    numbers = _numbers("--at-steps", text)
    return numbers if "," in text or len(numbers) != 1 else numbers[0]
