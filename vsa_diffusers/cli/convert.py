"""`vsa-diffusers convert`: from a published checkpoint to ours, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .output import answers, errors, print_json


def convert(
    source: Annotated[
        str,
        typer.Argument(help="Folder, file, or repository on the Hugging Face Hub.", metavar="SOURCE"),
    ],
    target: Annotated[Path, typer.Argument(help="Folder to write; it is made if need be.", metavar="TARGET")],
    to: Annotated[
        str,
        typer.Option(help="vsa: a published checkpoint as save_vsa writes them. fastvideo: the way back."),
    ] = "vsa",
    ratio: Annotated[
        float | None, typer.Option(help="top_k_ratio in the config; what it was trained with if left out.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Write a published checkpoint that was trained with VSA as `load_vsa` reads it, or the other way round.

    No tensor changes. Memory holds one shard and the gates at a time. The target is whole or as it was, also after a
    kill or with the disk full.

    **Examples**

    `vsa-diffusers convert FastVideo/FastWan2.1-T2V-14B-Diffusers fastwan-14b`

    `vsa-diffusers convert my_training/final for_fastvideo --to fastvideo`
    """
    from ..converting import convert as converted

    with errors.status("Converting ..."):
        changes: dict[str, Any] = {} if ratio is None else {"top_k_ratio": ratio}
        result = converted(source, target, to=to, **changes)
    if json:
        print_json(result.to_dict())
    else:
        answers.print(str(result), highlight=False, markup=False, soft_wrap=True)
