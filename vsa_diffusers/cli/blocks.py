"""What `--block-size` may hold."""

from __future__ import annotations

from collections.abc import Sequence


def block_of(values: Sequence[str] | None) -> str | tuple[int, int, int] | None:
    """`--block-size 4 4 4` as numbers, "auto" as it is, `None` if it was left out.

    Raises:
        ValueError: it is neither.
    """
    if not values:
        return None
    if list(values) == ["auto"]:
        return "auto"
    if len(values) != 3 or not all(value.isdigit() and int(value) for value in values):
        raise ValueError(f'--block-size {" ".join(values)} must be three numbers, such as 4 4 4, or "auto".')
    t, h, w = (int(value) for value in values)
    return t, h, w
