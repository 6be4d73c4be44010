"""Options under the same name in every script."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

VIDEO, SPARSITY, MACHINE = "The video", "Video Sparse Attention", "Where and how it runs"

Model = Annotated[str, typer.Option(help="Folder of a diffusers pipeline, or its name on the Hugging Face Hub.")]
Prompt = Annotated[str, typer.Option(help="What to show.", rich_help_panel=VIDEO)]
NegativePrompt = Annotated[str, typer.Option(help="What not to show.", rich_help_panel=VIDEO)]
Height = Annotated[int, typer.Option(help="Pixels.", rich_help_panel=VIDEO)]
Width = Annotated[int, typer.Option(help="Pixels.", rich_help_panel=VIDEO)]
NumFrames = Annotated[int, typer.Option(help="Number of frames.", rich_help_panel=VIDEO)]
FrameRate = Annotated[float, typer.Option(help="Frames per second.", rich_help_panel=VIDEO)]
NumInferenceSteps = Annotated[int, typer.Option(help="Denoising steps.", rich_help_panel=VIDEO)]
GuidanceScale = Annotated[float, typer.Option(help="How closely the prompt is followed.", rich_help_panel=VIDEO)]
Seed = Annotated[int, typer.Option(help="Of the noise: the same seed is the same video.", rich_help_panel=VIDEO)]
Output = Annotated[
    Path, typer.Option(help="Video file, .mp4, .mov or .mkv; folders are made.", dir_okay=False, rich_help_panel=VIDEO)
]

Ratio = Annotated[
    float, typer.Option(help="Share of the key tiles that are kept; lower is faster.", rich_help_panel=SPARSITY)
]
DenseSteps = Annotated[
    float, typer.Option(help="Share of the denoising steps, the first ones, that stay dense.", rich_help_panel=SPARSITY)
]
DenseLayers = Annotated[
    list[int],
    typer.Option(help="A layer that stays dense; -1 is the last. May be repeated.", rich_help_panel=SPARSITY),
]
Compare = Annotated[
    bool,
    typer.Option(
        "--compare",
        help="Make the dense video, too, from the same noise, beside --output, and say how fast and how close it is.",
        rich_help_panel=SPARSITY,
    ),
]

Compile = Annotated[
    bool,
    typer.Option(
        "--compile", help="Compile the transformer's blocks: minutes at first, then faster.", rich_help_panel=MACHINE
    ),
]
Offload = Annotated[
    str,
    typer.Option(
        help="none, or to save GPU memory, from fast to frugal: model, group, sequential.", rich_help_panel=MACHINE
    ),
]
Device = Annotated[str, typer.Option(help="Such as cuda, cuda:1 or cpu.", rich_help_panel=MACHINE)]
Dtype = Annotated[str, typer.Option(help="bfloat16, float16 or float32.", rich_help_panel=MACHINE)]
