"""How good the tiny Wan pipeline is: held-out captions judged by a detector, and the VAE's PSNR."""

import time
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import torch
from caption_detector import detect, validate
from diffusers import WanPipeline
from procedural_video import Description, descriptions
from rich.console import Console
from rich.progress import track
from rich.table import Table

from tiny_wan_parts import RECOMMENDED
from tiny_wan_vae import reconstruction_psnr
from vsa_diffusers import enable_vsa, load_vsa
from vsa_diffusers.pipeline import enabled_config


def held_out_captions(count: int) -> list[Description]:
    """The same `count` held-out descriptions every time, spread evenly over all of them."""
    everything = descriptions("held_out")
    return [everything[index * len(everything) // count] for index in range(count)]


def generate(pipeline: WanPipeline, prompt: str, seed: int, **overrides) -> torch.Tensor:
    """A video `[3, frames, height, width]` in [-1, 1], with the recommended settings unless overridden."""
    settings = {name: value for name, value in RECOMMENDED.items() if name not in ("prompt", "seed")} | overrides
    generator = torch.Generator("cpu").manual_seed(seed)
    video = pipeline(prompt=prompt, generator=generator, output_type="pt", **settings).frames[0]
    return video.float().cpu().transpose(0, 1) * 2 - 1


def contact_sheet(videos: list[torch.Tensor], path: Path, columns: int = 6) -> None:
    """One row per video, frames spread evenly over its length."""
    rows = []
    for video in videos:
        picks = torch.linspace(0, video.shape[1] - 1, columns).round().long()
        rows.append(torch.cat(list(video[:, picks].unbind(1)), dim=-1))
    image = ((torch.cat(rows, dim=-2) + 1) * 127.5).round().clamp(0, 255).byte()
    iio.imwrite(path, image.permute(1, 2, 0).numpy())


def make_sparse(pipeline: WanPipeline, directory: Path | None, options: dict[str, Any]) -> dict[str, Any]:
    """Enable VSA, with the weights and the config that `save_vsa` wrote into `directory`, or without training.

    Args:
        pipeline: is changed in place.
        directory: `None` keeps the weights.
        options: fields of `VSAConfig`, which override those that were saved.

    Returns:
        Whether the weights are fine-tuned ones, and the config.
    """
    options = {"schedule": "constant"} | options  # as all that was measured with this model
    if directory is None:
        enable_vsa(pipeline, **options)
    else:
        load_vsa(pipeline, directory, **options)
    return {"fine_tuned": directory is not None, **enabled_config(pipeline.transformer).to_dict()}


def evaluate_pipeline(
    folder: Path,
    device: torch.device,
    *,
    captions: int,
    vae_clips: int,
    side: int,
    frames: int,
    steps: int,
    sheet: Path | None = None,
    detector_clips: int = 100,
    vsa: Path | None = None,
    vsa_options: dict[str, Any] | None = None,
) -> dict:
    """Everything that the model card states, as plain numbers.

    With `vsa` or `vsa_options`, which `make_sparse` explains, it is the sparse pipeline that is judged. No VAE or
    detector clips leave that part out.
    """
    pipeline = WanPipeline.from_pretrained(folder, local_files_only=True).to(device)
    pipeline.set_progress_bar_config(disable=True)
    sparse = make_sparse(pipeline, vsa, vsa_options or {}) if vsa or vsa_options else None

    videos, verdicts = [], []
    wanted = held_out_captions(captions)
    started = time.monotonic()
    for seed, description in enumerate(track(wanted, description="Generating")):
        video = generate(
            pipeline, description.caption, seed, height=side, width=side, num_frames=frames, num_inference_steps=steps
        )
        verdict = detect(video)
        verdicts.append({"caption": description.caption, "seen": vars(verdict), "right": verdict.agrees(description)})
        videos.append(video)
    seconds = (time.monotonic() - started) / max(captions, 1)
    if sheet is not None:
        contact_sheet(videos, sheet)

    right = [verdict["right"] for verdict in verdicts]
    shares = {part: sum(one[part] for one in right) / len(right) for part in right[0]}
    result = {
        "generated": {
            "captions": captions,
            "height": side,
            "width": side,
            "num_frames": frames,
            "num_inference_steps": steps,
            "guidance_scale": RECOMMENDED["guidance_scale"],
            "right": {**shares, "all": sum(all(one.values()) for one in right) / len(right)},
            "seconds_per_video": round(seconds, 1),
        }
    }
    if sparse:
        result["vsa"] = sparse
    if detector_clips:
        on_rendered = validate(detector_clips, device=device)
        result["detector_on_rendered_clips"] = {"clips": detector_clips, "right": on_rendered}
    if vae_clips:
        psnr = reconstruction_psnr(pipeline.vae, device, vae_clips, side, frames)
        result["vae"] = {"clips": vae_clips, "psnr_db": round(psnr, 2)}
    result["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    result["verdicts"] = verdicts
    return result


def print_evaluation(result: dict) -> None:
    """The numbers for a person to read; parts that were left out are not mentioned."""
    generated, detector, vae, vsa = (
        result.get(part) for part in ("generated", "detector_on_rendered_clips", "vae", "vsa")
    )
    size = "{height}x{width}, {num_frames} frames, {num_inference_steps} steps".format(**generated)
    console = Console()
    table = Table(title=f"Held-out captions, {size}")
    table.add_column("right")
    columns = [generated["right"]]
    table.add_column(f"generated ({generated['captions']})", justify="right")
    if detector:
        columns.append(detector["right"])
        table.add_column(f"rendered ({detector['clips']})", justify="right")
    for part in generated["right"]:
        table.add_row(part, *(f"{shares[part]:.0%}" for shares in columns))
    console.print(table)
    if vsa:
        weights = "fine-tuned weights" if vsa["fine_tuned"] else "without training"
        fields = ", ".join(f"{name}={vsa[name]}" for name in ("top_k_ratio", "selection", "dense_steps"))
        console.print(f"VSA with {fields}, {weights}")
    if vae:
        console.print(f"VAE on {vae['clips']} held-out clips: {vae['psnr_db']} dB PSNR")
    console.print(f"{generated['seconds_per_video']} s per video on {result['device']}")
