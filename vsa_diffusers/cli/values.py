"""Options that take several values, as in `--ratios 0.5 0.2`."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any

from typer.core import TyperCommand


class SeveralValues(TyperCommand):
    """A command whose list options take their values one after the other, or repeat their name before each."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Repeat the name of a list option before each of its values, which is how they are parsed."""
        names = {name for each in self.params if getattr(each, "multiple", False) for name in each.opts}
        return super().parse_args(ctx, list(repeated(args, names)))


def repeated(args: Iterable[str], names: Collection[str]) -> Iterator[str]:
    """`args`, with the name of each of these options before every value of it."""
    name, values = None, 0
    for arg in args:
        if arg.startswith("-"):
            name, values = (arg if arg in names else None), 0
        elif name is not None:
            if values:
                yield name
            values += 1
        yield arg
