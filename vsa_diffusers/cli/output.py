"""Where the commands print: what was asked for to stdout, progress and errors to stderr."""

from __future__ import annotations

import json
import traceback
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape

REFUSALS = (ValueError, TypeError, OSError, ImportError)
answers = Console()
errors = Console(stderr=True)


def print_json(document: Any) -> None:
    """One JSON document on stdout, and nothing else there."""
    typer.echo(json.dumps(document, indent=2))


def tell(error: BaseException) -> None:
    """What is refused as one sentence; everything else is a fault, and keeps its traceback."""
    if isinstance(error, REFUSALS):
        errors.print(f"[red bold]error:[/] {escape(' '.join(str(error).split()))}", highlight=False, soft_wrap=True)
    else:
        traceback.print_exception(error)
