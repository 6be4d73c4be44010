"""Compare ways to choose the key tiles, on query, key and value of a small model as it denoises, and by its videos.

    PYTHONPATH=examples/training python examples/research/vsa_selection.py --pairs 4 --json selection.json
    PYTHONPATH=examples/training python examples/research/vsa_selection.py --model runs/clips_wan --grid 16x32x32

A pair is a prompt with a seed of its own. For every layer and head at a few steps of the dense run of each, every rule
keeps the same number of key tiles per query tile. The tables show the share of the softmax in the tiles kept and the
relative error of the output against dense attention, of `combine="merge"` and of "sparse"; at what ratio a rule's error
is that of quarters; and what rounding the means to bf16 or tf32 changes, against fp64. Query, key and value are rounded
to bf16 first, as kernels get them. Some rules also make whole videos at constant ratios, for PSNR to the dense ones.
Standard errors are over pairs.
"""

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import typer
from flow_sampling import sample
from rich.console import Console
from rich.progress import track
from rich.table import Table
from schedule_evidence import HeldOut, Row, attending, grid_of, make_videos, mean_and_error, row_of
from schedule_models import EvidenceModel, load_evidence_model
from selection_rules import BY_QUARTERS, RULES, SHORT, compare_roundings, compare_rules, selecting
from vsa_training.objective import velocity_error

from vsa_diffusers import video_sparse_attention
from vsa_diffusers.cli.script import run_script
from vsa_diffusers.files import replaced_file
from vsa_diffusers.logs import warnings_only
from vsa_diffusers.tiles import TileGrid

MODEL = Path(__file__).parents[1] / "tiny_wan"
BLOCK = (4, 4, 4)
RANDOM_CALLS = 16
MEASURES = ("mass", "merge", "sparse")
Call = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@contextmanager
def recorded(steps: Sequence[int], forwards: int, layers: int) -> Iterator[list[tuple[int, int, Call]]]:
    """Collects step, layer and tensors `[batch, sequence, heads, head_dim]` of the operation's calls, on the CPU.

    Args:
        steps: those wanted.
        forwards: of one step.
        layers: calls of one forward.
    """
    calls: list[tuple[int, int, Call]] = []
    count = 0

    def record(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, video_shape: Any, **options: Any) -> Any:
        nonlocal count
        step, layer = count // (forwards * layers), count % layers
        count += 1
        if step in steps:
            calls.append((step, layer, tuple(x.bfloat16().cpu() for x in (query, key, value))))
        return video_sparse_attention(query, key, value, video_shape, **options)

    with mock.patch("vsa_diffusers.processor.video_sparse_attention", record):
        yield calls


def calls_of(
    model: EvidenceModel, grid: TileGrid, pair: int, steps: int, every: int
) -> Iterator[tuple[int, int, Call]]:
    """Step, layer and query, key and value `[tiles, tokens, head_dim]` in fp32, of every head in a dense run."""
    wanted = range(every // 2, steps, every)
    layers = len(model.transformer.blocks)
    embeds, negative = model.prompts([pair])
    noise = model.noise([pair], grid.video_shape)
    everything = {"top_k_ratio": 1.0, "schedule": "constant", "block_size": grid.block_size}
    with attending(model, everything, ()), recorded(wanted, 1 + (model.guidance > 1), layers) as calls:
        sample(model.transformer, model.scheduler, noise, embeds, steps, negative, model.guidance)
    order = grid.token_index(model.device)
    for step, layer, tensors in calls:
        tiled = [x[0].to(model.device).float()[order] for x in tensors]  # [tiles, tokens, heads, head_dim]
        for head in range(tiled[0].shape[2]):
            query, key, value = (x[:, :, head].contiguous() for x in tiled)
            yield step, layer, (query, key, value)


def mean_of(rows: list[Row], by: tuple[str, ...], measures: Sequence[str]) -> list[Row]:
    """Means of each pair's means, with their standard errors over pairs, in groups of the same `by`."""
    groups: dict[tuple[Any, ...], dict[int, list[Row]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in by), {}).setdefault(row["pair"], []).append(row)
    found = []
    for values, pairs in groups.items():
        summed: Row = dict(zip(by, values, strict=True)) | {"pairs": len(pairs)}
        for name in measures:
            of_pairs = [math.fsum(row[name] for row in own) / len(own) for own in pairs.values()]
            summed[name], summed[f"{name}_standard_error"] = mean_and_error(of_pairs)
        found.append(summed)
    return found


def equal_ratios(rows: list[Row], ratios: Sequence[float], measure: str) -> list[Row]:
    """By rule and ratio: where the rule's error is what quarters have at the ratio, between the ratios measured.

    Averages over the pairs for which there is such a ratio.
    """
    by_pair = mean_of(rows, ("rule", "ratio", "pair"), (measure,))
    error = {(row["rule"], row["ratio"], row["pair"]): row[measure] for row in by_pair}
    found = []
    for rule in dict.fromkeys(row["rule"] for row in by_pair):
        for ratio in ratios:
            for pair in dict.fromkeys(row["pair"] for row in by_pair):
                curve = [(error[rule, each, pair], each) for each in sorted(ratios)]
                equal = between(curve, error[BY_QUARTERS, ratio, pair])
                if equal is not None:
                    found.append({"rule": rule, "ratio": ratio, "pair": pair, "equal": equal})
    return mean_of(found, ("rule", "ratio"), ("equal",))


def between(curve: Sequence[tuple[float, float]], x: float) -> float | None:
    """`y` on the line between the neighbours of `x` in a `curve` of falling `x`; `None` beyond its ends."""
    for (x0, y0), (x1, y1) in itertools.pairwise(curve):
        if x1 <= x <= x0:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0) if x0 > x1 else y0
    return None


def video_rows(
    model: EvidenceModel, grid: TileGrid, pairs: Sequence[int], steps: int, ratios: Sequence[float], batch_size: int
) -> list[Row]:
    """PSNR and SSIM to the dense videos, by rule, ratio and pair, with merge at constant ratios."""
    text, rows = "x".join(map(str, grid.video_shape)), []
    batches = [list(pairs[first : first + batch_size]) for first in range(0, len(pairs), batch_size)]
    todo = [(batch, rule, ratio) for batch in batches for rule in SHORT for ratio in ratios]
    dense: dict[int, torch.Tensor] = {}
    for batch, rule, ratio in track(todo, description="Videos"):
        if batch[0] not in dense:
            dense = dict(zip(batch, make_videos(model, text, steps, batch, {}, ())[0], strict=True))
        with selecting(RULES[rule]):
            videos, _ = make_videos(model, text, steps, batch, _options(grid, ratio), ())
        for pair, video in zip(batch, videos, strict=True):
            row = {"rule": rule, "ratio": ratio, "pair": pair}
            rows.append(row | row_of(video, dense[pair], model.is_right(video, pair)))
    return rows


def loss_rows(model: EvidenceModel, grid: TileGrid, count: int, ratios: Sequence[float], batch_size: int) -> list[Row]:
    """What rules add to the loss on held-out videos, and the distance to the dense prediction, in shares of the dense.

    By rule, ratio, level and video, which is the `pair` of a row. The loss is in shares of the dense one's mean over
    videos at the level.
    """
    if not count:
        return []
    held_out, rows = HeldOut(model, grid.video_shape, count), []
    batches = torch.arange(count, device=model.device).split(batch_size)
    todo = list(zip(held_out.shares.tolist(), held_out.sigmas, strict=True))
    for share, sigma in track(todo, description="Levels"):
        dense = [held_out.predicted(batch, sigma) for batch in batches]
        losses = [_losses(held_out, x, batch) for x, batch in zip(dense, batches, strict=True)]
        level = torch.cat(losses).mean()
        for rule, ratio in itertools.product(SHORT, ratios):
            for batch, before, loss in zip(batches, dense, losses, strict=True):
                with selecting(RULES[rule]), attending(model, _options(grid, ratio), ()):
                    ours = held_out.predicted(batch, sigma)
                added = (_losses(held_out, ours, batch) - loss) / level
                distance = (ours - before).square().flatten(1).mean(1) / before.square().flatten(1).mean(1)
                for video, *measures in zip(batch.tolist(), added.tolist(), distance.tolist(), strict=True):
                    row = {"rule": rule, "ratio": ratio, "share": share, "pair": video}
                    rows.append(row | dict(zip(("added", "distance"), measures, strict=True)))
    return rows


def _losses(held_out: HeldOut, predicted: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
    return velocity_error(predicted, held_out.clean[batch], held_out.noise[batch])


def _options(grid: TileGrid, ratio: float) -> Row:
    return {"top_k_ratio": ratio, "schedule": "constant", "block_size": grid.block_size, "implementation": "torch"}


def cell(row: Row, name: str, digits: int) -> str:
    error = row[f"{name}_standard_error"]
    return f"{row[name]:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def print_table(title: str, rows: list[Row], at: str, columns: Sequence[tuple[str, int]], first: str = "rule") -> None:
    """One line for each `first`; columns are the values of `at`, once for each name and its digits in `columns`."""
    values = sorted(dict.fromkeys(row[at] for row in rows))
    table = Table(title=title)
    for heading in (first, *(f"{name}, {value}" for name, _ in columns for value in values)):
        table.add_column(heading)
    for line in dict.fromkeys(row[first] for row in rows):
        own = {row[at]: row for row in rows if row[first] == line}
        cells = [cell(own[each], name, digits) if each in own else "" for name, digits in columns for each in values]
        table.add_row(line, *cells)
    Console(width=160).print(table)


def random_calls(grid: TileGrid, scale: float, count: int) -> Iterator[Call]:
    """Normally distributed query, key and value `[tiles, tokens, head_dim]` of bf16, the first times `scale`."""
    generator = torch.Generator().manual_seed(0)
    size = (grid.num_tiles, grid.tile_capacity, 128)
    for _ in range(count):
        query, key, value = (torch.randn(size, generator=generator).bfloat16().float() for _ in range(3))
        yield scale * query, key, value


@warnings_only()  # VSA is enabled many times
def main(
    model: Annotated[
        Path, typer.Option(help="Folder of the tiny Wan pipeline or of a clips model.", exists=True, file_okay=False)
    ] = MODEL,
    grid: Annotated[str, typer.Option(help="Grid of tokens, such as 16x32x32; as trained, if left out.")] = "",
    pairs: Annotated[int, typer.Option(help="Pairs of a prompt and a seed; 0 leaves the rules out.", min=0)] = 4,
    steps: Annotated[int, typer.Option(help="Denoising steps.", min=1)] = 12,
    every: Annotated[int, typer.Option(help="Look at one of so many steps.", min=1)] = 4,
    ratios: Annotated[str, typer.Option(help="Ratios to compare at.")] = "0.05,0.1,0.15,0.2,0.25,0.3",
    rounding_at: Annotated[float, typer.Option(help="Ratio at which rounding is looked at.")] = 0.2,
    video_pairs: Annotated[int, typer.Option(help="Pairs that videos are made of; 0 leaves them out.", min=0)] = 0,
    video_steps: Annotated[int, typer.Option(help="Denoising steps of videos.", min=1)] = 12,
    video_ratios: Annotated[str, typer.Option(help="Ratios of videos, and of losses.")] = "0.1,0.2,0.3",
    held_out: Annotated[int, typer.Option(help="Held-out videos for losses; 0 leaves them out.", min=0)] = 0,
    batch_size: Annotated[int, typer.Option(help="Videos made at once.", min=1)] = 8,
    device: Annotated[str, typer.Option(help="Where to run.")] = "cuda" if torch.cuda.is_available() else "cpu",
    json_path: Annotated[Path | None, typer.Option("--json", help="Also write what is found as JSON.")] = None,
) -> None:
    """Print what every rule keeps and loses."""
    judged = load_evidence_model(model, torch.device(device))
    shape = grid_of(grid) if grid else judged.usual_grid
    tiles = TileGrid(shape, BLOCK)
    if tiles.padding:
        raise typer.BadParameter(f"--grid {grid} has partial tiles; every extent must be a multiple of 4.")
    wanted, wanted_of_videos = ([float(ratio) for ratio in text.split(",")] for text in (ratios, video_ratios))
    rows: list[Row] = []
    rounded: list[Row] = []
    for pair in track(range(pairs), description="Pairs"):
        for step, layer, call in calls_of(judged, tiles, pair, steps, every):
            about = {"pair": pair, "step": step, "layer": layer}
            rows += [
                about | {"rule": rule, "ratio": ratio} | found
                for (rule, ratio), found in compare_rules(call, tiles, wanted).items()
            ]
            rounded += _rounding_rows(about | {"inputs": judged.name}, call, tiles, rounding_at)
    for scale in (1, 4, 16):
        for number, call in enumerate(random_calls(tiles, scale, RANDOM_CALLS)):
            on_device = [x.to(judged.device) for x in call]
            rounded += _rounding_rows({"pair": number, "inputs": f"random, {scale}"}, on_device, tiles, rounding_at)
    few = [row for row in rows if row["rule"] in SHORT]
    found: dict[str, list[Row]] = {
        "rules": mean_of(rows, ("rule", "ratio"), MEASURES),
        "rules_by_layer": mean_of(few, ("rule", "ratio", "layer"), MEASURES),
        "rules_by_step": mean_of(few, ("rule", "ratio", "step"), MEASURES),
        "equal_ratios": equal_ratios(rows, wanted, "merge"),
        "roundings": mean_of(rounded, ("inputs", "means", "rounding"), ("changed", "lost")),
        "losses": mean_of(
            loss_rows(judged, tiles, held_out, wanted_of_videos, batch_size), ("rule", "ratio"), ("added", "distance")
        ),
        "videos": video_rows(judged, tiles, range(video_pairs), video_steps, wanted_of_videos, batch_size),
    }
    print_found(found, f"{judged.name}, {'x'.join(map(str, shape))} tokens, {tiles.num_tiles} tiles")
    if json_path is not None:
        about = {"model": judged.name, "described": judged.described, "grid": list(shape), "steps": steps,
                 "every": every, "rounding_at": rounding_at, "video_steps": video_steps,
                 "device": torch.cuda.get_device_name() if device.startswith("cuda") else device}  # fmt: skip
        with replaced_file(json_path) as partial:
            partial.write_text(json.dumps({"about": about} | found, indent=1) + "\n")


def _rounding_rows(about: Row, call: Sequence[torch.Tensor], grid: TileGrid, ratio: float) -> list[Row]:
    return [
        about | {"means": means, "rounding": rounding} | found
        for (means, rounding), found in compare_roundings(call, grid, ratio).items()
    ]


def print_found(found: dict[str, list[Row]], title: str) -> None:
    """Every table."""
    for name, told in (("mass", "share of the softmax in the tiles kept"), ("merge", "relative error with merge"),
                       ("sparse", 'relative error with "sparse"')):  # fmt: skip
        print_table(f"{title}: {told}", found["rules"], "ratio", [(name, 4)])
    print_table(f"{title}: ratio at which the error with merge is that of quarters", found["equal_ratios"], "ratio",
                [("equal", 4)])  # fmt: skip
    for at in ("layer", "step"):
        own = [row for row in found[f"rules_by_{at}"] if row["ratio"] == 0.2]
        if own:
            print_table(f"{title}: mass and error with merge at 0.2, by {at}", own, at, [("mass", 3), ("merge", 3)])
    percent = [
        row | {name: 100 * row[name] for name in row if name.startswith(("changed", "lost")) and row[name] is not None}
        for row in found["roundings"]
    ]
    lines = [row | {"inputs, means": f"{row['inputs']}, {row['means']}"} for row in percent]
    print_table(f"{title}: kept tiles that rounding of the means changes, and mass that it loses, in %", lines,
                "rounding", [("changed", 3), ("lost", 5)], "inputs, means")  # fmt: skip
    if found["losses"]:
        losses = [row | {name: 100 * row[name] for name in row if name.startswith(("added", "distance"))
                         and row[name] is not None} for row in found["losses"]]  # fmt: skip
        told = "loss added to the dense one, and distance to the dense prediction, on held-out videos, in %"
        print_table(f"{title}: {told}", losses, "ratio", [("added", 2), ("distance", 2)])
    if found["videos"]:
        videos = mean_of(found["videos"], ("rule", "ratio"), ("psnr", "ssim"))
        print_table(f"{title}: PSNR and SSIM to the dense video", videos, "ratio", [("psnr", 2), ("ssim", 4)])


if __name__ == "__main__":
    run_script(main)
