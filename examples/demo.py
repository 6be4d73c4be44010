"""One prompt, made dense and with Video Sparse Attention: what it costs, and how close it is.

    python examples/demo.py [--prompt TEXT] [--ratios 0.3] [--dense-steps 0]
                            [--fine-tuned DIRECTORY | --no-fine-tuned] [--output DIRECTORY]

Uses the tiny Wan model beside this file, on the GPU if there is one: its weights as they are, spending a ratio at the
front of the run, which is the default, and alike in all steps; and, where there are any, weights that were fine-tuned
with VSA, at their own ratio. Writes `side_by_side.mp4`, `contact_sheet.png`,
`results.json` and `report.html`, and prints a table.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from diffusers import WanPipeline
from rich.console import Console
from rich.table import Table

from vsa_diffusers import VSAConfig, load_vsa
from vsa_diffusers.cli.progress import progress_bars
from vsa_diffusers.cli.script import run_script
from vsa_diffusers.comparison import Comparison, Setting, compare
from vsa_diffusers.files import replaced_file
from vsa_diffusers.generation.loading import recommended_call, with_own_transformers
from vsa_diffusers.pipeline import enabled_config
from vsa_diffusers.tiles import TileGrid, num_selected_tiles
from vsa_diffusers.video_files import write_video

MODEL = Path(__file__).parent / "tiny_wan"
FINE_TUNED = Path(__file__).parent / "tiny_wan_vsa"
BLOCK_SIZE = (4, 4, 4)
FPS = 16


@dataclass(frozen=True)
class Row:
    """One video, and what it took: seconds of all denoising steps; PSNR (dB) and SSIM against the dense video.

    Both are `None` for the dense video, and PSNR also for a video that is identical to it.
    """

    label: str
    ratio: float | None
    kept_tiles: int
    seconds: float
    speedup: float
    psnr: float | None = None
    ssim: float | None = None


def main(
    prompt: Annotated[str | None, typer.Option(help="What to draw; the default is the model's own example.")] = None,
    ratios: Annotated[list[float], typer.Option(help="Values of top_k_ratio to compare with dense.")] = [0.3],  # noqa: B006
    dense_steps: Annotated[float, typer.Option(help="Share of the steps, the first ones, that stay dense.")] = 0.0,
    dense_layers: Annotated[
        list[int], typer.Option(help="Layers that stay dense; fine-tuned weights bring their own.")
    ] = [0],  # noqa: B006
    selection: Annotated[str, typer.Option(help="What key tiles are scored by: mean, quarters or auto.")] = "auto",
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the initial noise.")] = None,
    fine_tuned: Annotated[
        Path | None,
        typer.Option(
            help="Fine-tuned weights, as save_vsa writes them; the default model has its own in tiny_wan_vsa.",
            exists=True,
            file_okay=False,
        ),
    ] = None,
    without_fine_tuned: Annotated[bool, typer.Option("--no-fine-tuned", help="Leave fine-tuned weights out.")] = False,
    output: Annotated[Path, typer.Option(help="Where everything is written.")] = Path("demo_output"),
    model: Annotated[Path, typer.Option(help="Directory of the tiny Wan model.", exists=True, file_okay=False)] = MODEL,
) -> None:
    """Make one video dense and with Video Sparse Attention, side by side."""
    console = Console()
    call, usual_seed = recommended_call(model)
    call |= {"prompt": prompt or call["prompt"], "num_inference_steps": steps or call["num_inference_steps"]}
    seed = usual_seed if seed is None else seed

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    pipe = WanPipeline.from_pretrained(model, dtype=dtype).to(device)
    pipe.set_progress_bar_config(disable=True)
    settings = []
    for ratio in ratios:
        dense = {"dense_steps": dense_steps, "dense_layers": tuple(dense_layers)}
        for schedule, words in (("front", ""), ("constant", ", constant")):
            config = VSAConfig(ratio, block_size=BLOCK_SIZE, selection=selection, schedule=schedule, **dense)
            settings.append(Setting(f"VSA {ratio:g}{words}", config))
    if fine_tuned is None and FINE_TUNED.exists() and model.samefile(MODEL):
        fine_tuned = FINE_TUNED
    tuned = None
    if fine_tuned is not None and not without_fine_tuned:
        tuned = fine_tuned_setting(pipe, fine_tuned, dense_steps)
        settings.append(tuned)

    grid = TileGrid(video_shape(pipe, call), BLOCK_SIZE)
    console.print(f'"{call["prompt"]}", {call["num_frames"]} frames of {call["width"]}x{call["height"]}, on {device}')
    console.print(f"Dense in all of them: {of_steps(dense_steps)} and {of_layers(dense_layers)}.")
    shared = {name: value for name, value in call.items() if name != "prompt"}
    with progress_bars() as progress:
        comparison = compare(
            pipe, call["prompt"], settings, output, arguments=shared, seed=seed, fps=FPS, reuse=False, progress=progress
        )
    results = rows_of(comparison, grid)

    videos = [result.made[0].video.frames for result in comparison.results]
    write_side_by_side(output / "side_by_side.mp4", videos)
    numbers = {"device": device, "tokens": grid.num_tokens, "tiles": grid.num_tiles, "padding": grid.padding}
    numbers |= {"call": call, "seed": seed, "selection": selection}
    numbers |= {"dense_steps": dense_steps, "dense_layers": dense_layers}
    numbers["fine_tuned"] = None if tuned is None else tuned.to_dict()
    numbers["results"] = [asdict(result) for result in results]
    with replaced_file(output / "results.json") as partial:
        partial.write_text(json.dumps(numbers, indent=2) + "\n")
    console.print(table_of(results, grid))
    if comparison.hint is not None:  # on a GPU, for which this video is tiny, too
        console.print(comparison.hint)
    if tuned is not None:
        console.print("The dense video is by the weights as they are; fine-tuned ones need not repeat it.")
    console.print(f"Left to right in {output / 'side_by_side.mp4'}: {'; '.join(result.label for result in results)}.")
    console.print(f"Frames beside each other: {output / 'contact_sheet.png'}. Numbers: {output / 'results.json'}.")
    console.print(f"All of it on one page: {output / 'report.html'}.")


def of_steps(dense_steps: float) -> str:
    """Dense steps in words."""
    return f"the first {dense_steps:.0%} of the steps" if dense_steps else "no step"


def of_layers(dense_layers: list[int]) -> str:
    """Dense layers in words."""
    if not dense_layers:
        return "no layer"
    return f"layer{'s' if len(dense_layers) > 1 else ''} {', '.join(map(str, dense_layers))}"


def fine_tuned_setting(pipe: WanPipeline, directory: Path, dense_steps: float) -> Setting:
    """The weights in `directory` on a copy of the pipeline's transformer, attending as they were trained to.

    Trained sparse at every noise level, they can do without dense steps, but get as many as the other videos, so that
    the table compares like with like.
    """
    tuned = with_own_transformers(pipe)
    load_vsa(tuned, directory, dense_steps=dense_steps)
    config = enabled_config(tuned.transformer)
    return Setting(f"VSA {config.top_k_ratio:g}, fine-tuned", config, tuned)


def rows_of(comparison: Comparison, grid: TileGrid) -> list[Row]:
    """The numbers of the only prompt."""
    rows = []
    for result in comparison.results:
        ratio = result.setting.config and result.setting.config.top_k_ratio
        kept = grid.num_tiles if ratio is None else num_selected_tiles(grid.num_tiles, ratio)
        row = Row(result.setting.name, ratio, kept, result.made[0].denoising, comparison.speedup(result))
        for close in result.close:
            row = replace(row, psnr=None if math.isinf(close.psnr) else close.psnr, ssim=close.ssim)
        rows.append(row)
    return rows


def video_shape(pipe: WanPipeline, call: dict) -> tuple[int, int, int]:
    """The token grid (T, H, W) of a call to the pipeline."""
    frames = (call["num_frames"] - 1) // pipe.vae_scale_factor_temporal + 1
    extents = (frames, call["height"] // pipe.vae_scale_factor_spatial, call["width"] // pipe.vae_scale_factor_spatial)
    t, h, w = (extent // patch for extent, patch in zip(extents, pipe.transformer.config.patch_size, strict=True))
    return t, h, w


def write_side_by_side(path: Path, videos: list[np.ndarray]) -> None:
    """All videos in one."""
    write_video(path, np.concatenate(videos, axis=2), FPS)


def table_of(results: list[Row], grid: TileGrid) -> Table:
    """The numbers for a person to read."""
    title = f"{grid.num_tokens} tokens {grid.video_shape}, {grid.num_tiles} tiles of {grid.tile_capacity}, "
    table = Table(title=f"{title}{grid.padding:.0%} padding")
    for heading in ("", "tiles kept", "seconds", "times dense", "PSNR, dB", "SSIM"):
        table.add_column(heading, justify="left" if not heading else "right", no_wrap=not heading)
    for each in results:
        psnr = "" if each.ssim is None else "identical" if each.psnr is None else f"{each.psnr:.1f}"
        ssim = "" if each.ssim is None else f"{each.ssim:.3f}"
        kept = f"{each.kept_tiles} of {grid.num_tiles}"
        table.add_row(each.label, kept, f"{each.seconds:.1f}", f"{each.speedup:.2f}x", psnr, ssim)
    return table


if __name__ == "__main__":
    run_script(main)
