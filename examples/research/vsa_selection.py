"""Compare ways to choose the key tiles, on the query, key and value of the tiny Wan model as it denoises.

    PYTHONPATH=examples/training python examples/research/vsa_selection.py

For every layer and head at a few denoising steps, each rule keeps the same number of key tiles per query tile. The
table shows the mean relative error of the output against dense attention, of `combine="merge"` and of "sparse".
"""

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated
from unittest import mock

import torch
import typer
from diffusers import WanPipeline
from rich.console import Console
from rich.progress import track
from rich.table import Table

from vsa_diffusers import enable_vsa, video_sparse_attention
from vsa_diffusers.cli.script import run_script
from vsa_diffusers.files import replaced_file
from vsa_diffusers.tiles import TileGrid, num_selected_tiles

MODEL = Path(__file__).parents[1] / "tiny_wan"
Parts = tuple[int, int, int]
Calls = list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def record_calls(model: Path, steps: int, every: int) -> tuple[Calls, tuple[int, int, int]]:
    """Query, key and value `[tokens, head_dim]` of every layer and head at some steps, and the video shape."""
    recommended = json.loads((model / "recommended.json").read_text())
    generator = torch.Generator("cpu").manual_seed(recommended.pop("seed"))
    pipe = WanPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    enable_vsa(pipe, top_k_ratio=1.0)
    batches, shapes = [], set()

    def record(query, key, value, video_shape, **options):
        batches.append((query, key, value))
        shapes.add(tuple(video_shape))
        return video_sparse_attention(query, key, value, video_shape, **options)

    with mock.patch("vsa_diffusers.processor.video_sparse_attention", record):
        options = recommended | {"num_inference_steps": steps, "output_type": "latent"}
        pipe(generator=generator, **options)
    layers = len(pipe.transformer.blocks)
    kept = (batch for index, batch in enumerate(batches) if index // (2 * layers) % every == every // 2)
    calls = [tuple(x[0, :, head].float() for x in batch) for batch in kept for head in range(batch[0].shape[2])]
    return calls, shapes.pop()


def block_means(x: torch.Tensor, parts: Parts, order: torch.Tensor, grid: TileGrid) -> torch.Tensor:
    """Means of each tile's `parts` blocks, `[tiles, blocks, head_dim]`, for tiles that are all full."""
    tiles = x[order].unflatten(1, grid.block_size)
    for axis, count in enumerate(parts):
        tiles = tiles.unflatten(1 + 2 * axis, (count, -1))
    return tiles.mean((2, 4, 6)).flatten(1, 3)


def logits_of_means(query, key, parts: tuple[Parts, Parts], order, grid) -> torch.Tensor:
    """Logits between the means of query and key blocks, `[tiles, blocks, tiles, blocks]`."""
    q, k = (block_means(x, each, order, grid) for x, each in zip((query, key), parts, strict=True))
    return torch.einsum("iad,jbd->iajb", q, k) * q.shape[-1] ** -0.5


def scores_by_means(*parts: Parts) -> Callable:
    """Share of attention that each key tile gets from the query tile's block means, `[tiles, tiles]`."""

    def scores(query, key, order, grid):
        logits = logits_of_means(query, key, parts, order, grid)
        return logits.flatten(2).softmax(-1).unflatten(2, logits.shape[2:]).sum(3).mean(1)

    return scores


def against_tile_means(*parts: Parts) -> Callable:
    """As `scores_by_means`, but what each query block gives away is summed over the means of whole key tiles."""

    def scores(query, key, order, grid):
        whole = logits_of_means(query, key, (parts[0], (1, 1, 1)), order, grid).logsumexp((2, 3), keepdim=True)
        mass = (logits_of_means(query, key, parts, order, grid) - whole).logsumexp((1, 3))
        return mass.softmax(-1)

    return scores


def highest_pair(*parts: Parts, relative: bool = False) -> Callable:
    """The highest logit of a query block and a key block; `relative` to the highest that the query block has."""

    def scores(query, key, order, grid):
        logits = logits_of_means(query, key, parts, order, grid)
        if relative:
            logits = logits - logits.amax((2, 3), keepdim=True)
        return logits.amax((1, 3)).softmax(-1)

    return scores


def exact_mass(query, key, order, grid):
    """What the rules above estimate: the share that each key tile gets from the query tile's own tokens."""
    weights = (query[order.flatten()] @ key[order.flatten()].T * query.shape[-1] ** -0.5).softmax(-1)
    size = order.shape[1]
    return weights.unflatten(1, (-1, size)).sum(2).unflatten(0, (-1, size)).mean(1)


RULES = {
    'mean of query, mean of key (selection="mean")': scores_by_means((1, 1, 1), (1, 1, 1)),
    "keys in 2 halves, in time": scores_by_means((1, 1, 1), (2, 1, 1)),
    "keys in 4 quarters, in space": scores_by_means((1, 1, 1), (1, 2, 2)),
    "queries in 2 halves, in time": scores_by_means((2, 1, 1), (1, 1, 1)),
    "queries in 4 quarters, in space": scores_by_means((1, 2, 2), (1, 1, 1)),
    "both in 2 halves, in time": scores_by_means((2, 1, 1), (2, 1, 1)),
    "both in 4 quarters, in space": scores_by_means((1, 2, 2), (1, 2, 2)),
    "both in 4 quarters, sums over tile means": against_tile_means((1, 2, 2), (1, 2, 2)),
    "highest pair of quarters, per query quarter": highest_pair((1, 2, 2), (1, 2, 2), relative=True),
    'highest pair of quarters (selection="quarters")': highest_pair((1, 2, 2), (1, 2, 2)),
    "highest pair of 2 halves, in width": highest_pair((1, 1, 2), (1, 1, 2)),
    "both in 8 parts": scores_by_means((2, 2, 2), (2, 2, 2)),
    "exact mass (not available to a kernel)": exact_mass,
}


def outputs(query, key, value, kept, order, tile_of) -> Iterator[torch.Tensor]:
    """Merge, then sparse, given which tiles are kept, bool `[tiles, tiles]`."""
    scale = query.shape[-1] ** -0.5
    logits = (query @ key.T * scale).masked_fill(~kept[tile_of][:, tile_of], -torch.inf)
    pooled = query @ key[order].mean(1).T * scale + torch.log(torch.tensor(float(order.shape[1])))
    pooled = pooled.masked_fill(kept[tile_of], -torch.inf)
    yield torch.cat([logits, pooled], 1).softmax(-1) @ torch.cat([value, value[order].mean(1)])
    yield logits.softmax(-1) @ value


def main(
    model: Annotated[
        Path, typer.Option(help="Directory of the tiny Wan pipeline.", exists=True, file_okay=False)
    ] = MODEL,
    ratios: Annotated[str, typer.Option(help="Ratios to compare at.")] = "0.3,0.2,0.1",
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 12,
    every: Annotated[int, typer.Option(help="Look at one of so many steps.")] = 4,
    output: Annotated[Path | None, typer.Option(help="Also write the errors as JSON.")] = None,
) -> None:
    """Print the errors of every rule."""
    calls, video_shape = record_calls(model, steps, every)
    grid = TileGrid(video_shape, (4, 4, 4))
    order = grid.token_index()
    tile_of = torch.empty(grid.num_tokens, dtype=torch.long)
    tile_of[order.flatten()] = torch.arange(grid.num_tiles).repeat_interleave(order.shape[1])
    wanted = [float(ratio) for ratio in ratios.split(",")]
    errors: dict[str, dict[str, list[float]]] = {name: {} for name in RULES}
    for query, key, value in track(calls, description="Attention calls"):
        dense = (query @ key.T * query.shape[-1] ** -0.5).softmax(-1) @ value
        for (name, rule), ratio in itertools.product(RULES.items(), wanted):
            top = rule(query, key, order, grid).topk(num_selected_tiles(grid.num_tiles, ratio), dim=-1).indices
            kept = torch.zeros(grid.num_tiles, grid.num_tiles, dtype=torch.bool).scatter_(1, top, value=True)
            for combine, result in zip(
                ("merge", "sparse"), outputs(query, key, value, kept, order, tile_of), strict=True
            ):
                error = float((result - dense).norm() / dense.norm())
                errors[name].setdefault(f"{combine} {ratio:g}", []).append(error)
    means = {name: {at: sum(x) / len(x) for at, x in row.items()} for name, row in errors.items()}
    columns = list(next(iter(means.values())))
    table = Table(title=f"Mean relative error over {len(calls)} attention calls", show_lines=False)
    for column in ("tiles are chosen by", *columns):
        table.add_column(column)
    for name, row in means.items():
        table.add_row(name, *(f"{row[column]:.3f}" for column in columns))
    Console(width=150).print(table)
    if output is not None:
        with replaced_file(output) as partial:
            partial.write_text(json.dumps(means, indent=2) + "\n")


if __name__ == "__main__":
    run_script(main)
