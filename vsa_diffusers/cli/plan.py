"""`vsa-diffusers plan`: what to expect, before anything is downloaded."""

from __future__ import annotations

from typing import Annotated

import typer

from .output import answers, errors, print_json


def plan(
    model: Annotated[
        str,
        typer.Argument(
            help="A family (wan, ltx2, cogvideox, ...), the id of a checkpoint on the Hugging Face Hub, or the folder "
            "of a pipeline or of its transformer. Families and the usual ids need no network.",
            metavar="MODEL",
        ),
    ],
    height: Annotated[int | None, typer.Option(help="Pixels; the model's usual if left out.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels; the model's usual if left out.")] = None,
    frames: Annotated[int | None, typer.Option(help="Of the video; the model's usual if left out.")] = None,
    ratios: Annotated[
        list[float] | None, typer.Option(help="top_k_ratios to look at, such as: --ratios 0.5 0.2", metavar="RATIO...")
    ] = None,
    block_size: Annotated[
        list[str] | None,
        typer.Option(
            help='Tokens per tile, such as 4 4 4; fitted to the grid if left out, or if "auto".', metavar="T H W"
        ),
    ] = None,
    gpu: Annotated[str, typer.Option(help="Whose measurements to estimate from: H100 or H200.")] = "H100",
    measure: Annotated[
        bool, typer.Option("--measure", help="Time a layer of exactly this shape on this machine instead.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Say what Video Sparse Attention will do for a model and a size: grid, tiles, speed-up, advice.

    Nothing is downloaded but, for ids that are not known, configurations. Speeds are interpolated between
    measurements that ship with the package; what they are from is printed with them.

    **Examples**

    `vsa-diffusers plan wan`

    `vsa-diffusers plan ltx2 --height 1088 --width 1920 --frames 121`

    `vsa-diffusers plan Wan-AI/Wan2.1-T2V-14B-Diffusers --ratios 0.3 0.15 --measure`
    """
    from ..planning import plan as planned
    from .blocks import block_of

    with errors.status("Reading the configuration ...") as status:
        result = planned(
            model,
            height,
            width,
            frames,
            **({"ratios": ratios} if ratios else {}),
            gpu=gpu.upper(),
            block_size=block_of(block_size),
            measure=measure,
            progress=lambda what: status.update(f"Timing {what} ..."),
        )
    if json:
        print_json(result.to_dict())
    else:
        answers.print(result)
