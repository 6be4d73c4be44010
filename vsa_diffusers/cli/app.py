"""`vsa-diffusers`: its commands, and how it ends when one of them cannot go on."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from ..version import __version__
from .bench import bench
from .compare import compare
from .convert import convert
from .doctor import doctor
from .generate import generate
from .inspect import inspect
from .plan import plan
from .script import TRACEBACK, refusals
from .tune import tune
from .values import SeveralValues

app = typer.Typer(
    name="vsa-diffusers",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda name: name.replace("_", "-"),  # --dense_steps is --dense-steps
    },
)
app.command(cls=SeveralValues)(plan)
app.command(cls=SeveralValues)(generate)
app.command(cls=SeveralValues)(compare)
app.command(cls=SeveralValues)(inspect)
app.command(cls=SeveralValues)(tune)
app.command()(convert)
app.command()(doctor)
app.command(cls=SeveralValues)(bench)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    traceback: Annotated[bool, typer.Option("--traceback", help=TRACEBACK)] = False,
) -> None:
    """Video Sparse Attention for diffusers' video pipelines."""


def main(argv: list[str] | None = None) -> None:
    """Run one command, and exit; how it ends when something is refused, `refusals` says."""
    with refusals("--traceback" in (sys.argv[1:] if argv is None else argv)):
        app(argv)
