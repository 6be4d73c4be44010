"""Where the commands print: what was asked for to stdout, progress and errors to stderr."""

from __future__ import annotations

import json
from typing import Any

import typer
from rich.console import Console

answers = Console()
errors = Console(stderr=True)


def print_json(document: Any) -> None:
    """One JSON document on stdout, and nothing else there."""
    typer.echo(json.dumps(document, indent=2))
