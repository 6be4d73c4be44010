"""`vsa-diffusers bench`: one attention layer, timed."""

from __future__ import annotations

import typer


def bench(context: typer.Context) -> None:
    """Time one attention layer, dense and sparse, on this machine (see `bench --help`)."""
    from ..bench.__main__ import main

    main(context.args)
