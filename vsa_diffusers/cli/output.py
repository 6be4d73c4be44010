"""Where the commands print: what was asked for to stdout, progress and errors to stderr."""

from __future__ import annotations

from rich.console import Console

answers = Console()
errors = Console(stderr=True)
