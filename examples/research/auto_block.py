"""Compare blocks of (4, 4, 4) with those that `block_size="auto"` fits to the grid, on the tiny Wan model.

    PYTHONPATH=examples/training python examples/research/auto_block.py

The transformer is given what it sees in the pipeline at a few denoising steps of dense runs from several seeds, with
and without the prompt. The table shows the relative error of its output against its own dense one, mean and standard
error over seeds, and the share of key tokens that were kept: at equal ratio, and for the fitted block also at the ratio
that keeps as many tokens as (4, 4, 4) did, of which the tiles at the edges hold fewer.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import typer
from diffusers import WanPipeline
from rich.console import Console
from rich.progress import track
from rich.table import Table

from vsa_diffusers import attention, disable_vsa, enable_vsa
from vsa_diffusers.cli.script import run_script
from vsa_diffusers.files import replaced_file
from vsa_diffusers.tiles import TileGrid, fitting_block_size, num_kept_tiles

MODEL = Path(__file__).parents[1] / "tiny_wan"
CUBE = (4, 4, 4)
Inputs = dict[str, Any]
Size = tuple[int, int, int]
Pair = tuple[float, float]
Settings = Mapping[str, Any]


def seen_inputs(pipe: Any, settings: Settings, size: Size, steps: int, seed: int) -> list[Inputs]:
    """The transformer's arguments in a dense run: two calls a step, for the prompt and without."""
    height, width, num_frames = size
    calls: list[Inputs] = []

    def note(module: torch.nn.Module, args: tuple[Any, ...], kwargs: Inputs) -> None:
        calls.append(
            {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in kwargs.items()}
        )

    handle = pipe.transformer.register_forward_pre_hook(note, with_kwargs=True)
    sizes = {"height": height, "width": width, "num_frames": num_frames, "num_inference_steps": steps}
    try:
        generator = torch.Generator("cpu").manual_seed(seed)
        pipe(generator=generator, **{**settings, **sizes, "output_type": "latent"})
    finally:
        handle.remove()
    return calls


def measured(transformer: torch.nn.Module, calls: list[Inputs], dense: list[torch.Tensor], options: Inputs) -> Pair:
    """Mean relative error of the output over the calls with VSA enabled so, and the share of key tokens kept."""
    errors, shares = [], []
    operation = attention.forward

    def count(*args: Any, output_alone: bool = False) -> Any:
        outputs, grid = operation(*args), args[5].grid
        sizes = (grid.token_index() >= 0).sum(1)
        shares.append(float(sizes[outputs[1].long()].sum(-1).float().mean()) / grid.num_tokens)
        return outputs

    enable_vsa(transformer, **options)
    with mock.patch("vsa_diffusers.attention.forward", count):
        for inputs, expected in zip(calls, dense, strict=True):
            output = transformer(**inputs)[0]
            errors.append(float((output - expected).norm() / expected.norm()))
    disable_vsa(transformer)
    return sum(errors) / len(errors), sum(shares) / len(shares)


def compare(pipe: Any, settings: Settings, size: Size, steps: int, seeds: int, ratios: list[float]) -> list[Inputs]:
    """Rows of the table for one size."""
    transformer = pipe.transformer
    found: dict[tuple[float, str, Size, float], list[Pair]] = {}
    grid: Size | None = None
    for seed in track(range(seeds), description=f"{size[0]}x{size[1]}, {size[2]} frames"):
        calls = seen_inputs(pipe, settings, size, steps, seed)
        t, h, w = calls[0]["hidden_states"].shape[-3:]
        grid = (t, h // 2, w // 2)
        fitted = fitting_block_size(grid)
        with torch.no_grad():
            dense = [transformer(**inputs)[0] for inputs in calls]

            def add(ratio: float, name: str, block: Size, own: float, calls=calls, dense=dense) -> float:
                pair = measured(transformer, calls, dense, {"top_k_ratio": own, "block_size": block})
                found.setdefault((ratio, name, block, own), []).append(pair)
                return pair[1]

            for ratio in ratios:
                share = add(ratio, "(4, 4, 4)", CUBE, ratio)
                if fitted != CUBE:
                    first = next(
                        (key[3] for key in found if key[:2] == (ratio, "auto, as many tokens")), round(share, 3)
                    )
                    add(ratio, "auto", fitted, ratio)
                    add(ratio, "auto, as many tokens", fitted, first)
    assert grid is not None
    rows = []
    for (ratio, name, block, own), pairs in found.items():
        errors, shares = torch.tensor(pairs).T
        tiles = TileGrid(grid, block)
        rows.append({
            "video": list(size), "grid": list(grid), "at": ratio, "what": name, "block": list(block), "ratio": own,
            "kept": num_kept_tiles(tiles, None, own), "tiles": tiles.num_tiles, "tokens_kept": shares.mean().item(),
            "error": errors.mean().item(), "seeds": seeds,
            "standard_error": errors.std().item() / math.sqrt(seeds) if seeds > 1 else None,
        })  # fmt: skip
    return rows


def main(
    model: Annotated[
        Path, typer.Option(help="Directory of the tiny Wan pipeline.", exists=True, file_okay=False)
    ] = MODEL,
    sizes: Annotated[str, typer.Option(help="Videos as height x width x frames.")] = "256x256x61,256x208x61,256x256x17",
    ratios: Annotated[str, typer.Option(help="Ratios to compare at.")] = "0.25,0.125",
    steps: Annotated[int, typer.Option(help="Denoising steps: so many noise levels.")] = 3,
    seeds: Annotated[int, typer.Option(help="Dense runs for each size.")] = 3,
    output: Annotated[Path | None, typer.Option(help="Also write the rows as JSON.")] = None,
) -> None:
    """Print the errors for both blocks."""
    settings = json.loads((model / "recommended.json").read_text())
    settings.pop("seed")
    pipe = WanPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    rows = []
    for text in sizes.split(","):
        height, width, frames = map(int, text.split("x"))
        wanted = [float(ratio) for ratio in ratios.split(",")]
        rows += compare(pipe, settings, (height, width, frames), steps, seeds, wanted)
    table = Table(title=f"Error of the transformer's output, {seeds} seeds, {steps} noise levels")
    for column in ("grid", "at", "what", "block", "tiles kept", "tokens kept", "relative error"):
        table.add_column(column)
    for row in rows:
        spread = "" if row["standard_error"] is None else f" ± {row['standard_error']:.4f}"
        table.add_row(
            str(tuple(row["grid"])), f"{row['at']:g}", row["what"], str(tuple(row["block"])),
            f"{row['kept']} of {row['tiles']}", f"{100 * row['tokens_kept']:.0f} %", f"{row['error']:.4f}{spread}",
        )  # fmt: skip
    Console(width=130).print(table)
    if output is not None:
        with replaced_file(output) as partial:
            partial.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    run_script(main)
