"""`vsa-diffusers`: its commands, and how it ends when one of them cannot go on."""

from __future__ import annotations

import sys
import traceback
from typing import Annotated

import typer

from ..version import __version__
from .bench import bench
from .compare import compare
from .doctor import doctor
from .generate import generate
from .output import REFUSALS, tell
from .plan import plan
from .values import SeveralValues

REFUSED = 2
INTERRUPTED = 130
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
    traceback: Annotated[bool, typer.Option("--traceback", help="With an error, show where it came from.")] = False,
) -> None:
    """Video Sparse Attention for diffusers' video pipelines."""


def main(argv: list[str] | None = None) -> None:
    """Run one command, and exit.

    What is refused with a `ValueError`, `TypeError`, `OSError` or `ImportError` ends in one sentence and status 2, and
    Ctrl-C in status 130. Other exceptions are faults, and keep their traceback.
    """
    try:
        app(argv)
    except REFUSALS as error:
        if "--traceback" in (sys.argv[1:] if argv is None else argv):
            traceback.print_exc()
        tell(error)
        raise SystemExit(REFUSED) from None
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
