"""Scripts: called, refused and helped as the commands are."""

from __future__ import annotations

import contextlib
import inspect
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any

import typer

from .output import REFUSALS, tell

REFUSED = 2
INTERRUPTED = 130
TRACEBACK = "With an error, show where it came from."


@contextlib.contextmanager
def refusals(show_traceback: bool = False) -> Iterator[None]:
    """End the process with one sentence and status 2 where the block refuses what it was given.

    Exceptions other than `REFUSALS` are faults, and keep their traceback. Ctrl-C ends the process with status 130.
    """
    try:
        yield
    except REFUSALS as error:
        if show_traceback:
            traceback.print_exc()
        tell(error)
        raise SystemExit(REFUSED) from None
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None


def run_script(main: Callable[..., None], argv: Sequence[str] | None = None) -> None:
    """Run a script of one function, whose arguments are its options, as typer reads them; then exit.

    Every option may be written with hyphens or with underscores, and there is `--traceback` besides.

    Args:
        main: what the script does; its docstring is the beginning of `--help`.
        argv: the words after the script's name; those of this process if left out.
    """
    script_app(main)(argv)


def script_app(main: Callable[..., None]) -> typer.Typer:
    """The app that `run_script` runs."""
    app = typer.Typer(
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="markdown",
        context_settings={"help_option_names": ["-h", "--help"], "token_normalize_func": _hyphens},
    )
    app.command()(_refusing(main))
    return app


def _hyphens(word: str) -> str:
    return word.replace("_", "-")


def _refusing(main: Callable[..., None]) -> Callable[..., None]:
    """The same function inside of `refusals`, with one more option, for these."""
    signature = inspect.signature(main, eval_str=True)
    option = inspect.Parameter(
        "traceback",
        inspect.Parameter.KEYWORD_ONLY,
        default=False,
        annotation=Annotated[bool, typer.Option("--traceback", help=TRACEBACK)],
    )

    def command(traceback: bool, **options: Any) -> None:
        # Inside of typer, which answers Ctrl-C in its own way.
        with refusals(traceback):
            main(**options)

    parameters = [*signature.parameters.values(), option]
    command.__doc__ = main.__doc__
    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {each.name: each.annotation for each in parameters}
    return command
