"""Tables of pages that follow from measurements: found by section, compared, and replaced in place."""

import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Table:
    """The rows of one table, below its header.

    Args:
        page: the file, from the repository's root.
        section: its heading.
        rows: as they shall be.
        place: which of the section's tables it is.
    """

    page: str
    section: str
    rows: list[str]
    place: int = 0

    def in_page(self) -> list[str]:
        """The rows as they are."""
        lines, begin, end = self._found()
        return [line.strip() for line in lines[begin:end]]

    def write(self) -> None:
        """Put the rows where they belong."""
        lines, begin, end = self._found()
        (ROOT / self.page).write_text("\n".join([*lines[:begin], *self.rows, *lines[end:]]))

    def _found(self) -> tuple[list[str], int, int]:
        lines = (ROOT / self.page).read_text().split("\n")
        [heading] = [n for n, line in enumerate(lines) if re.fullmatch(rf"#+ {re.escape(self.section)}", line)]
        ends = [n for n, line in enumerate(lines) if n > heading and line.startswith("#")]
        section = range(heading, min(ends, default=len(lines)))
        rules = [n for n in section if re.fullmatch(r"\|(-+\|)+", lines[n])]
        if self.place >= len(rules):
            raise ValueError(f"section {self.section!r} of {self.page} has no table {self.place}; name another.")
        begin = rules[self.place] + 1
        end = next(n for n in range(begin, len(lines) + 1) if n == len(lines) or not lines[n].startswith("|"))
        return lines, begin, end


def line(cells: Iterable[str]) -> str:
    """A row of a Markdown table."""
    return "|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|"


def spaced(number: int) -> str:
    """6 144."""
    return f"{number:,}".replace(",", " ")


def percent(share: float, form: str = ".0f") -> str:
    """29 %."""
    return f"{100 * share:{form}} %"


def main(tables: list[Table]) -> None:
    """Print what differs from the pages, and with `--write` put it there."""
    for table in tables:
        if table.in_page() == table.rows:
            continue
        print(f"{table.page}, {table.section}, table {table.place}:", *table.rows, "", sep="\n")
        if "--write" in sys.argv[1:]:
            table.write()
