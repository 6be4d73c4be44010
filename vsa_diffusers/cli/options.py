"""Options that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

VIDEO, LOADING = "The video", "The model"
SPARSITY = "Video Sparse Attention"

Model = Annotated[
    str, typer.Argument(help="Folder of a diffusers pipeline, or its name on the Hugging Face Hub.", metavar="MODEL")
]
NegativePrompt = Annotated[str | None, typer.Option(help="What not to show.", rich_help_panel=VIDEO)]
Height = Annotated[int | None, typer.Option(help="Pixels; each model has its own default.", rich_help_panel=VIDEO)]
Width = Annotated[int | None, typer.Option(help="Pixels.", rich_help_panel=VIDEO)]
Frames = Annotated[int | None, typer.Option(help="Number of frames.", rich_help_panel=VIDEO)]
Steps = Annotated[int | None, typer.Option(help="Denoising steps.", rich_help_panel=VIDEO)]
GuidanceScale = Annotated[float | None, typer.Option(help="Of classifier-free guidance.", rich_help_panel=VIDEO)]
Seed = Annotated[
    int | None, typer.Option(help="Of the noise; 0 unless the model recommends one.", rich_help_panel=VIDEO)
]
FramesPerSecond = Annotated[
    float | None,
    typer.Option("--fps", help="Frames per second; each model has its own default.", rich_help_panel=VIDEO),
]
Image = Annotated[
    Path | None,
    typer.Option(help="First frame, for image-to-video pipelines.", exists=True, dir_okay=False, rich_help_panel=VIDEO),
]
More = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="Any other argument of the pipeline's call; may be repeated.",
        rich_help_panel=VIDEO,
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(help="bfloat16 (default on GPUs), float16 or float32 (default on CPUs).", rich_help_panel=LOADING),
]
Device = Annotated[
    str | None, typer.Option(help="Such as cuda, cuda:1 or cpu; the GPU if there is one.", rich_help_panel=LOADING)
]
Offload = Annotated[
    str,
    typer.Option(
        help="none, or to save GPU memory, from fast to frugal: model, group, sequential.", rich_help_panel=LOADING
    ),
]
Compile = Annotated[
    bool,
    typer.Option(
        "--compile", help="Compile the transformer's blocks: minutes at first, then faster.", rich_help_panel=LOADING
    ),
]
Lora = Annotated[
    str | None, typer.Option(help="LoRA: a directory, .safetensors file or repository.", rich_help_panel=LOADING)
]
Gates = Annotated[str | None, typer.Option(help="Gates that save_gates wrote.", rich_help_panel=LOADING)]
TopK = Annotated[
    int | None, typer.Option(help="Number of key tiles that are kept, instead of a ratio.", rich_help_panel=SPARSITY)
]
BlockSize = Annotated[
    list[str] | None, typer.Option(help="Tokens per tile, such as 4 4 4, or auto.", rich_help_panel=SPARSITY)
]
DenseSteps = Annotated[
    str | None,
    typer.Option(help="First steps that stay dense: a number (2) or a share (0.2).", rich_help_panel=SPARSITY),
]
DenseLayers = Annotated[
    str | None, typer.Option(help="Layers that stay dense, such as 0,-1.", rich_help_panel=SPARSITY)
]
Schedule = Annotated[
    str | None,
    typer.Option(
        help="How the ratio changes over the steps: constant; front, where the ratio is the mean and most of it is "
        "spent early; or a ramp FIRST:LAST:POWER, such as 0.8:0.05:2.",
        rich_help_panel=SPARSITY,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the results as JSON, and nothing else, to stdout.")]


def sparse_fields(**options: Any) -> dict[str, Any]:
    """Options as fields of `VSAConfig`; those that were not given are left out."""
    from ..generation.sparsity import read_value

    if isinstance(options.get("block_size"), list):
        options["block_size"] = "x".join(options["block_size"])
    given = {name: value for name, value in options.items() if value not in (None, "")}
    return {name: read_value(name, value) if isinstance(value, str) else value for name, value in given.items()}


def call_options(more: list[str] | None, **options: Any) -> dict[str, Any]:
    """Options as arguments of a pipeline's call, those of `--set` last."""
    from ..generation.calling import named_arguments

    return {**options, **named_arguments(more or [])}
