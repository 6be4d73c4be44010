"""What choosing.md shows of plans and recipes, so that the page says what the code does.

python docs/make_choosing.py          # prints the tables that are no longer current
python docs/make_choosing.py --write  # and puts them, and the example, into the page
"""

import functools
import io
import sys
from collections.abc import Iterator

from rich.console import Console

from make_tables import ROOT, Table, line, main, percent, spaced
from vsa_diffusers.planning import Plan, plan
from vsa_diffusers.planning.models import family_names
from vsa_diffusers.planning.speed import measured
from vsa_diffusers.recipes import NAMES, SMALL, recipe_of, size_class

# (how the table calls it, what `plan` is asked for)
VIDEOS = (
    ("LTX-2", ("ltx2", 256, 256, 25)),
    ("LTX-2", ("ltx2", 384, 384, 49)),
    ("LTX-2", ("ltx2", 512, 768, 121)),
    ("LTX-2", ("ltx2", 1088, 1920, 121)),
    ("CogVideoX-5B", ("cogvideox", 480, 720, 49)),
    ("Wan 2.1 1.3B", ("wan", 480, 832, 81)),
    ("Wan 2.2 5B", ("Wan-AI/Wan2.2-TI2V-5B-Diffusers", 704, 1280, 121)),
    ("Wan 2.1 14B", ("Wan-AI/Wan2.1-T2V-14B-Diffusers", 720, 1280, 81)),
    ("HunyuanVideo", ("hunyuan_video", 720, 1280, 129)),
)
RATIO = 0.2
EXAMPLE = "wan"


def tables() -> list[Table]:
    """All of them."""
    page = "docs/choosing.md"
    return [
        Table(page, "Is it worth it", list(videos()), 1),
        Table(page, "Recipes", list(recipes())),
        Table(page, "Recipes", list(gains()), 1),
        Table(page, "How far off a plan is", list(shares())),
    ]


def write_example() -> None:
    """Put what `plan` prints into the page."""
    page = ROOT / "docs" / "choosing.md"
    begin, rest = page.read_text().split("```text\n", 1)
    page.write_text(f"{begin}```text\n{example()}\n{rest[rest.index('```') :]}")


def example() -> str:
    """What `vsa-diffusers plan wan` prints on a terminal of 80 columns."""
    console = Console(width=80, file=io.StringIO())
    console.print(plan(EXAMPLE))
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def videos() -> Iterator[str]:
    """Grid, tokens, tiles, class, share of attention and what a whole model gains, by video."""
    for name, arguments in VIDEOS:
        found = plan(*arguments, ratios=[RATIO])
        height, width, frames = found.size
        yield line([
            f"{name}, {height}x{width}, {frames} frames", by(found.video_shape), spaced(found.tokens),
            f"{spaced(found.tiles)} of {by(found.block)}", found.kind,
            f"{percent(found.attention_of_flops)} / {percent(found.attention_of_time)}",
            f"{found.speeds[0].layer:.2f}x", f"{found.speeds[0].model:.2f}x",
        ])  # fmt: skip


def shares() -> Iterator[str]:
    """The share of attention by FLOPs beside the measured one, for every whole transformer that was measured."""
    for row in measured()["models"]:
        time = row["attention_dense_s"] / row["dense_s"]
        off = measured()["rest"][row["gpu"]]["left_out"][row["model"]]
        yield line([
            row["gpu"], row["model"], percent(row["attention_share_of_flops"]), percent(time),
            f"{row['dense_s'] / row['sparse_s']:.2f}x", percent(off, "+.1f"),
        ])  # fmt: skip


def recipes() -> Iterator[str]:
    """The settings of each recipe, and what they rest on."""
    for which, family in (("most", "Wan"), ("AnyFlow, Kandinsky 6 (few steps)", "AnyFlow")):
        for size in (SMALL, "large"):
            for name in NAMES:
                recipe = recipe_of(family, size, name)
                layers = ", ".join(map(str, recipe.dense_layers))
                steps = f"first {percent(recipe.dense_steps)}"
                yield line([which, size, f"`{name}`", f"{recipe.top_k_ratio:g}", steps, layers, recipe.source])


@functools.lru_cache(maxsize=1)
def usual_plans() -> dict[str, Plan]:
    """What to expect of every family's usual video by what `plan` calls it, in the order of the families' names."""
    plans = {name: plan(name, ratios=[RATIO]) for name in family_names()}
    return dict(sorted(plans.items(), key=lambda each: each[1].family.lower()))


def gains() -> Iterator[str]:
    """What each recipe is expected to gain for the usual video of every family."""
    for found in usual_plans().values():
        height, width, frames = found.size
        cells = [f"{each.speedup:.2f}x" for each in found.recipes] or ["too small", "", ""]
        yield line([found.family, f"{height}x{width}, {frames}", spaced(found.tokens), sized(found), *cells])


def sized(found: Plan) -> str:
    """The size that its recipes are of."""
    return size_class(found.tokens)


def by(extents: tuple[int, ...]) -> str:
    """16x16x24."""
    return "x".join(map(str, extents))


if __name__ == "__main__":
    main(tables())
    if "--write" in sys.argv[1:]:
        write_example()
