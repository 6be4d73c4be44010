"""`vsa-diffusers doctor`: whether everything that is needed works here."""

from __future__ import annotations

from typing import Annotated

import typer

from .output import answers, errors, print_json


def doctor(json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False) -> None:
    """Look at what is installed, say which kernel will run and why, and test the operation against fp64.

    Takes seconds; on a GPU the kernels are compiled first. The exit status is 1 if something is broken.

    **Examples**

    `vsa-diffusers doctor`

    `vsa-diffusers doctor --json > doctor.json` for a report of a fault
    """
    from ..doctor import examine

    with errors.status("Looking at versions, GPUs and kernels, and testing the operation ..."):
        found = examine()
    if json:
        print_json(found.to_dict())
    else:
        answers.print(found)
    if found.is_broken:
        raise typer.Exit(1)
