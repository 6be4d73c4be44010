"""The table of scaling.md that puts what several GPUs were measured to take beside what it was on paper.

python docs/make_scaling.py          # prints it if it is no longer what was measured
python docs/make_scaling.py --write  # and puts it into the page
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from make_tables import Table, line, main, percent

MEASUREMENTS = Path(__file__).parent / "measurements"
NOT_MEASURED = "not measured"


class OnPaper(NamedTuple):
    """By Ulysses at a ratio of 0.2 (merge): MB and ms are of one layer and one GPU."""

    seconds: float
    efficiency: float
    sent: int
    exchange: float
    copies: float


# From times of one H100; docs/scaling.md says what they rest on.
ON_PAPER = {
    ("wan14b-720p", 2): OnPaper(3.63, 0.94, 774, 2.6, 2.5),
    ("wan14b-720p", 4): OnPaper(1.84, 0.93, 581, 1.9, 1.2),
    ("wan14b-720p", 8): OnPaper(0.93, 0.92, 339, 1.1, 0.6),
    ("hunyuan-720p", 2): OnPaper(5.52, 0.95, 730, 2.4, 2.3),
    ("hunyuan-720p", 4): OnPaper(2.80, 0.94, 547, 1.8, 1.2),
    ("hunyuan-720p", 8): OnPaper(1.41, 0.93, 319, 1.1, 0.6),
}
MODELS = {"wan14b-720p": ("Wan 14B 720p", 40), "hunyuan-720p": ("HunyuanVideo 720p", 60)}


def tables() -> list[Table]:
    """The one there is."""
    return [Table("docs/scaling.md", "Beside what it was on paper", list(rows()))]


def rows() -> Iterator[str]:
    """Each model on 2, 4 and 8 GPUs."""
    measured = {
        (row["model"], row["gpus"]): row
        for file in sorted(MEASUREMENTS.glob("h200-x*p.json"))
        for row in json.loads(file.read_text())["rows"]
        if row["what"] == "merge 0.2" and row.get("way", "Ulysses") == "Ulysses" and is_whole(row)
    }
    for (model, gpus), paper in ON_PAPER.items():
        name, layers = MODELS[model]
        yield line([name, str(gpus), *cells(measured.get((model, gpus)), paper, gpus, layers)])


def is_whole(row: dict) -> bool:
    """Whether all layers of one of the models were measured."""
    return row["model"] in MODELS and row.get("layers") in (None, MODELS[row["model"]][1])


def cells(row: dict | None, paper: OnPaper, gpus: int, layers: int) -> Iterator[str]:
    """Each number as it was measured, then as it was on paper."""
    found = [NOT_MEASURED] + [""] * (len(paper) - 1)
    if row is not None:
        slowest = max(row["ranks"], key=lambda each: each["seconds"])
        exchange = slowest["exchange"]
        found[0] = f"{row['seconds']:.2f}"
        found[1] = percent(row["speedup"] / gpus)
        if "sent_bytes" in slowest:
            found[2] = f"{slowest['sent_bytes'] / layers / 1e6:.0f}"
        found[3] = f"{1e3 * exchange / layers:.1f}"
        found[4] = f"{1e3 * (slowest['to_heads'] + slowest['to_tokens'] - exchange) / layers:.1f}"
    expected = [f"{paper.seconds:.2f}", percent(paper.efficiency), str(paper.sent), f"{paper.exchange:.1f}",
                f"{paper.copies:.1f}"]  # fmt: skip
    for pair in zip(found, expected, strict=True):
        yield from pair


if __name__ == "__main__":
    main(tables())
