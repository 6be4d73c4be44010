"""How the two training scripts are called, their options being a dataclass, and how they end when they cannot begin."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

from vsa_diffusers.cli.script import TRACEBACK, refusals


def run_script(options: type, begin: Callable[[Any], Callable[[], None] | None], description: str) -> None:
    """Parse the command line into `options`, call `begin` with them, and then what it returns, if that is something.

    What `begin` refuses ends the process as `refusals` says. Later errors are faults, and keep their traceback.
    """
    parser = HfArgumentParser(options, description=description)
    parser.add_argument("--traceback", action="store_true", help=TRACEBACK)
    with refusals("--traceback" in sys.argv[1:]):
        chosen, _ = parser.parse_args_into_dataclasses()
        go_on = begin(chosen)
    if go_on is not None:
        go_on()


def check_pretrained(name: str, *parts: str) -> None:
    """Whether a pipeline can be there, before a library goes and looks for it on the Hub.

    Raises:
        ValueError: it is a directory that lacks something, or a path to nothing.
    """
    path = Path(name)
    if path.is_dir():
        missing = [part for part in parts if not (path / part).is_dir()]
        if missing:
            raise ValueError(
                f"pretrained_model_name_or_path={name!r} has no {missing[0]}/; there are: "
                f"{', '.join(sorted(each.name for each in path.iterdir() if each.is_dir())) or 'no folders'}."
            )
    elif name.count("/") != 1 or name.startswith((".", "~", "/")) or path.exists():
        raise ValueError(
            f"pretrained_model_name_or_path={name!r} is neither a directory nor a repository's name, such as "
            "Wan-AI/Wan2.1-T2V-1.3B-Diffusers."
        )
