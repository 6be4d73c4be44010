"""Tables of bad arguments: every row is a call that must be refused by name, and not from deep inside."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import vsa_diffusers

PACKAGE = Path(vsa_diffusers.__file__).parent


class BadCall(NamedTuple):
    """A call, and what the message of its error must contain."""

    message: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]


def bad(message: str, function: Callable[..., Any], *arguments: Any, **keywords: Any) -> BadCall:
    """A row of a table."""
    return BadCall(message, function, arguments, keywords)


def table(rows: list[BadCall]) -> Any:
    """Parametrises a test's `row`; each is called by its function and the message that it wants."""
    return pytest.mark.parametrize("row", rows, ids=lambda row: f"{row.function.__name__}-{row.message}")


def assert_refused(row: BadCall) -> None:
    """The call raises a plain `ValueError` or `TypeError` of this package, in one sentence with the wanted words."""
    with pytest.raises((ValueError, TypeError)) as raised:
        row.function(*row.arguments, **row.keywords)
    message = str(raised.value)
    assert raised.type in (ValueError, TypeError)
    assert row.message in message
    assert message.endswith(".")
    assert "\n" not in message
    assert PACKAGE in Path(raised.traceback[-1].path).parents, "raised from deep inside"
