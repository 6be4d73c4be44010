"""One prompt, made dense and with Video Sparse Attention: what it costs, and how close it is.

    python examples/demo.py [--prompt TEXT] [--ratios 0.25 --ratios 0.125] [--dense-steps 0.2]
                            [--fine-tuned DIRECTORY | --no-fine-tuned] [--output DIRECTORY]

Uses the tiny Wan model beside this file, on the GPU if there is one: its weights as they are, and, where there are any,
weights that were fine-tuned with VSA, at their own ratio. Writes `side_by_side.mp4`, `contact_sheet.png` and
`results.json`, and prints a table.
"""

from __future__ import annotations

import copy
import json
import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import imageio.v3 as imageio
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
import typer
from diffusers import WanPipeline
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from vsa_diffusers import VSAConfig, disable_vsa, enable_vsa, load_vsa
from vsa_diffusers.files import replaced_file
from vsa_diffusers.pipeline import enabled_config
from vsa_diffusers.tiles import TileGrid, num_selected_tiles

MODEL = Path(__file__).parent / "tiny_wan"
FINE_TUNED = Path(__file__).parent / "tiny_wan_vsa"
BLOCK_SIZE = (4, 4, 4)


@dataclass(frozen=True)
class Run:
    """One way to make the video: a pipeline, and how it attends sparsely, if it does."""

    label: str
    pipe: WanPipeline
    config: VSAConfig | None = None


@dataclass
class Result:
    """One video, and what it took: seconds of all denoising steps; PSNR (dB) and SSIM against the dense video."""

    label: str
    ratio: float | None
    kept_tiles: int
    seconds: float
    speedup: float
    psnr: float | None = None
    ssim: float | None = None


def main(
    prompt: Annotated[str | None, typer.Option(help="What to draw; the default is the model's own example.")] = None,
    ratios: Annotated[list[float], typer.Option(help="Values of top_k_ratio to compare with dense.")] = [0.25, 0.125],  # noqa: B006
    dense_steps: Annotated[float, typer.Option(help="Share of the steps, the first ones, that stay dense.")] = 0.2,
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
    model: Annotated[Path, typer.Option(help="Directory of the tiny Wan model.")] = MODEL,
) -> None:
    """Make one video dense and with Video Sparse Attention, side by side."""
    console = Console()
    recommended = json.loads((model / "recommended.json").read_text())
    call = {name: value for name, value in recommended.items() if name != "seed"}
    call |= {"prompt": prompt or call["prompt"], "num_inference_steps": steps or call["num_inference_steps"]}
    seed = recommended["seed"] if seed is None else seed

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    pipe = WanPipeline.from_pretrained(model, torch_dtype=dtype).to(device)
    pipe.set_progress_bar_config(disable=True)
    runs = [Run("dense", pipe)]
    for ratio in ratios:
        dense = {"dense_steps": dense_steps, "dense_layers": tuple(dense_layers)}
        runs.append(Run(f"VSA {ratio:g}", pipe, VSAConfig(ratio, block_size=BLOCK_SIZE, selection=selection, **dense)))
    if fine_tuned is None and FINE_TUNED.exists() and model.samefile(MODEL):
        fine_tuned = FINE_TUNED
    tuned = None
    if fine_tuned is not None and not without_fine_tuned:
        tuned = fine_tuned_run(pipe, fine_tuned, dense_steps)
        runs.append(tuned)

    grid = TileGrid(video_shape(pipe, call), BLOCK_SIZE)
    console.print(f'"{call["prompt"]}", {call["num_frames"]} frames of {call["width"]}x{call["height"]}, on {device}')
    console.print(f"Dense in all of them: the first {dense_steps:.0%} of the steps, {of_layers(dense_layers)}.")
    videos, results = make_videos(runs, call, seed, grid, console)

    output.mkdir(parents=True, exist_ok=True)
    write_video(output / "side_by_side.mp4", videos)
    write_contact_sheet(output / "contact_sheet.png", videos, results, call["prompt"])
    numbers = {"device": device, "tokens": grid.num_tokens, "tiles": grid.num_tiles, "padding": grid.padding}
    numbers |= {"call": call, "seed": seed, "selection": selection}
    numbers |= {"dense_steps": dense_steps, "dense_layers": dense_layers}
    numbers["fine_tuned"] = None if tuned is None else tuned.config.to_dict()
    numbers["results"] = [asdict(result) for result in results]
    with replaced_file(output / "results.json") as partial:
        partial.write_text(json.dumps(numbers, indent=2) + "\n")
    console.print(table_of(results, grid))
    if tuned is not None:
        console.print("The dense video is by the weights as they are; fine-tuned ones need not repeat it.")
    console.print(f"Left to right in {output / 'side_by_side.mp4'}: {'; '.join(result.label for result in results)}.")
    console.print(f"Frames beside each other: {output / 'contact_sheet.png'}. Numbers: {output / 'results.json'}.")


def of_layers(dense_layers: list[int]) -> str:
    """Dense layers in words."""
    if not dense_layers:
        return "and no layer"
    return f"and layer{'s' if len(dense_layers) > 1 else ''} {', '.join(map(str, dense_layers))}"


def fine_tuned_run(pipe: WanPipeline, directory: Path, dense_steps: float) -> Run:
    """The weights in `directory` on a copy of the pipeline's transformer, attending as they were trained to.

    Trained sparse at every noise level, they can do without dense steps, but get as many as the other videos, so that
    the table compares like with like.
    """
    tuned = WanPipeline(**pipe.components | {"transformer": copy.deepcopy(pipe.transformer)})
    tuned.set_progress_bar_config(disable=True)
    load_vsa(tuned, directory, dense_steps=dense_steps)
    config = enabled_config(tuned.transformer)
    return Run(f"VSA {config.top_k_ratio:g}, fine-tuned", tuned, config)


def make_videos(
    runs: list[Run], call: dict, seed: int, grid: TileGrid, console: Console
) -> tuple[list[torch.Tensor], list[Result]]:
    """The video of every run, all from the same noise, the first of them being what the others are compared with."""
    videos, results = [], []
    with Progress(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console) as progress:
        tasks = [progress.add_task(run.label, total=call["num_inference_steps"] + 1) for run in runs]
        warm_up(runs, call, seed)
        for task, run in zip(tasks, runs, strict=True):
            latents, seconds = generate(run, call, seed, lambda task=task: progress.advance(task))
            videos.append(decode(run.pipe, latents))
            progress.advance(task)
            ratio = run.config and run.config.top_k_ratio
            kept = grid.num_tiles if ratio is None else num_selected_tiles(grid.num_tiles, ratio)
            speedup = results[0].seconds / seconds if results else 1.0
            results.append(Result(run.label, ratio, kept, seconds, speedup))
            if ratio is not None:
                results[-1].psnr, results[-1].ssim = closeness(videos[-1], videos[0])
    return videos, results


def video_shape(pipe: WanPipeline, call: dict) -> tuple[int, int, int]:
    """The token grid (T, H, W) of a call to the pipeline."""
    frames = (call["num_frames"] - 1) // pipe.vae_scale_factor_temporal + 1
    extents = (frames, call["height"] // pipe.vae_scale_factor_spatial, call["width"] // pipe.vae_scale_factor_spatial)
    t, h, w = (extent // patch for extent, patch in zip(extents, pipe.transformer.config.patch_size, strict=True))
    return t, h, w


def generate(run: Run, call: dict, seed: int, on_step=lambda: None) -> tuple[torch.Tensor, float]:
    """Latents of one video, and the seconds that it took."""

    def callback(pipe, step, timestep, tensors):
        on_step()
        return tensors

    if run.config is not None:
        enable_vsa(run.pipe, config=run.config)
    generator = torch.Generator("cpu").manual_seed(seed)
    synchronize()
    start = time.perf_counter()
    latents = run.pipe(**call, generator=generator, output_type="latent", callback_on_step_end=callback).frames
    synchronize()
    seconds = time.perf_counter() - start
    disable_vsa(run.pipe)
    return latents, seconds


def warm_up(runs: list[Run], call: dict, seed: int) -> None:
    """The first call of all is slower, and so is, on a GPU, the first one of a sparse run: it compiles the kernels."""
    for run in runs if torch.cuda.is_available() else runs[:1]:
        # One step with a share of dense ones would be dense.
        config = run.config and replace(run.config, dense_steps=0)
        generate(replace(run, config=config), call | {"num_inference_steps": 1}, seed)


def synchronize() -> None:
    """Wait until the GPU, if there is one, has done its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@torch.no_grad()
def decode(pipe: WanPipeline, latents: torch.Tensor) -> torch.Tensor:
    """Frames `[frames, 3, height, width]` in 0 to 1, as `WanPipeline` decodes them."""
    shape = (1, pipe.vae.config.z_dim, 1, 1, 1)
    mean, std = (torch.tensor(x, device=latents.device).view(shape) for x in
                 (pipe.vae.config.latents_mean, pipe.vae.config.latents_std))  # fmt: skip
    latents = (latents.float() * std + mean).to(pipe.vae.dtype)
    video = pipe.vae.decode(latents, return_dict=False)[0]
    return pipe.video_processor.postprocess_video(video, output_type="pt")[0].float().cpu()


def closeness(video: torch.Tensor, reference: torch.Tensor) -> tuple[float, float]:
    """PSNR in dB and SSIM of one video against another; identical videos have a PSNR of infinity."""
    psnr = peak_signal_noise_ratio(video, reference, data_range=1.0)
    ssim = structural_similarity_index_measure(video, reference, data_range=1.0)
    return float(psnr), float(ssim)


def write_video(path: Path, videos: list[torch.Tensor]) -> None:
    """All videos side by side, 16 frames per second."""
    frames = torch.cat(videos, dim=3).permute(0, 2, 3, 1).mul(255).round().byte().numpy()
    imageio.imwrite(path, frames, plugin="FFMPEG", fps=16, macro_block_size=8)


def write_contact_sheet(path: Path, videos: list[torch.Tensor], results: list[Result], prompt: str) -> None:
    """Six frames of each video, one row per video."""
    matplotlib.use("agg")
    picks = np.linspace(0, len(videos[0]) - 1, 6).round().astype(int)
    figure, axes = plt.subplots(len(videos), len(picks), figsize=(12, 2.2 * len(videos)), squeeze=False)
    for row, video, result in zip(axes, videos, results, strict=True):
        for axis, frame in zip(row, picks, strict=True):
            axis.imshow(video[frame].permute(1, 2, 0).numpy())
            axis.set_xticks([])
            axis.set_yticks([])
            if video is videos[0]:
                axis.set_title(f"frame {frame}", fontsize=9)
        row[0].set_ylabel(f"{result.label}\n{result.kept_tiles} of {results[0].kept_tiles} tiles", fontsize=10)
    figure.suptitle(prompt)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def table_of(results: list[Result], grid: TileGrid) -> Table:
    """The numbers for a person to read."""
    title = f"{grid.num_tokens} tokens {grid.video_shape}, {grid.num_tiles} tiles of {grid.tile_capacity}, "
    table = Table(title=f"{title}{grid.padding:.0%} padding")
    for heading in ("", "tiles kept", "seconds", "times dense", "PSNR, dB", "SSIM"):
        table.add_column(heading, justify="left" if not heading else "right", no_wrap=not heading)
    for each in results:
        psnr = "" if each.psnr is None else "identical" if math.isinf(each.psnr) else f"{each.psnr:.1f}"
        ssim = "" if each.ssim is None else f"{each.ssim:.3f}"
        kept = f"{each.kept_tiles} of {grid.num_tiles}"
        table.add_row(each.label, kept, f"{each.seconds:.1f}", f"{each.speedup:.2f}x", psnr, ssim)
    return table


if __name__ == "__main__":
    typer.run(main)
