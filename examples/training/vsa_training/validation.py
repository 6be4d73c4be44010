"""How good the model is so far: its loss on held-out clips, and videos to look at."""

from __future__ import annotations

from pathlib import Path

import diffusers
import numpy as np
import torch
from accelerate import Accelerator

from vsa_diffusers.files import replaced_file

from .dataset import Sample, Shards, collate
from .objective import add_noise, velocity_error


def predict(transformer: torch.nn.Module, batch: Sample, noisy: torch.Tensor, sigmas: torch.Tensor, axis: int):
    """The transformer's velocity for noisy latents in its layout, with the batch's conditions."""
    hidden = batch.with_extra_channels(noisy, axis)
    scale = batch.timestep_scale
    timestep = scale * (1000 * sigmas).view(-1, *[1] * (scale.ndim - 1))
    output = transformer(hidden_states=hidden, timestep=timestep, return_dict=False, **batch.conditions)
    output = output if isinstance(output, torch.Tensor) else output[0]
    # Some models predict a variance, too.
    return output.narrow(axis, 0, noisy.shape[axis])


@torch.no_grad()
def validation_loss(
    accelerator: Accelerator, model: torch.nn.Module, held_out: Shards, axis: int, sigmas: torch.Tensor
) -> float:
    """Mean loss over held-out clips at each of these noise levels; the noise is the same at every call."""
    model.eval()
    sums = torch.zeros(2, device=accelerator.device, dtype=torch.float64)
    # Each process runs the model equally often, as sharded models need; the surplus has no weight.
    rounds = -(-len(held_out) // accelerator.num_processes)
    for turn in range(rounds):
        index = turn * accelerator.num_processes + accelerator.process_index
        sample = held_out[index % len(held_out)]
        batch = collate([sample] * len(sigmas)).to(accelerator.device, torch.float32)
        clean = batch.clean
        generator = torch.Generator().manual_seed(index)
        noise = torch.randn(clean.shape, generator=generator).to(clean)
        sigmas = sigmas.to(clean)
        with accelerator.autocast():
            prediction = predict(model, batch, add_noise(clean, noise, sigmas), sigmas, axis)
        if index < len(held_out):
            sums += torch.stack([velocity_error(prediction, clean, noise).double().sum(), sums.new_tensor(len(sigmas))])
    model.train()
    total, count = accelerator.reduce(sums, "sum").tolist()
    return total / count


@torch.no_grad()
def validation_videos(pipe: diffusers.DiffusionPipeline, prompts: list[str], call: dict, seed: int) -> list[np.ndarray]:
    """Frames `[frames, height, width, 3]`, uint8, one video per prompt."""
    videos = []
    for prompt in prompts:
        generator = torch.Generator().manual_seed(seed)
        frames = pipe(prompt=prompt, generator=generator, output_type="np", **call).frames[0]
        videos.append((np.asarray(frames) * 255).round().astype(np.uint8))
    return videos


def log_videos(
    accelerator: Accelerator, folder: Path, videos: list[np.ndarray], prompts: list[str], fps: float, step: int
) -> None:
    """Write the videos as files, and hand them to trackers that show videos."""
    import imageio.v3 as imageio

    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"step-{step:07d}-{place}.mp4" for place in range(len(videos))]
    for file, video in zip(files, videos, strict=True):
        # Encoded first: FFMPEG goes by the file's name, and the one beside it has another ending.
        encoded = imageio.imwrite("<bytes>", video, plugin="FFMPEG", extension=".mp4", fps=fps, macro_block_size=1)
        with replaced_file(file) as partial:
            partial.write_bytes(encoded)
    for tracker in accelerator.trackers:
        if tracker.name == "wandb":
            import wandb

            shown = [wandb.Video(str(file), caption=prompt) for file, prompt in zip(files, prompts, strict=True)]
            tracker.log({"validation": shown}, step=step)
        if tracker.name == "tensorboard":
            frames = [np.concatenate(list(video[np.linspace(0, len(video) - 1, 6).astype(int)]), 1) for video in videos]
            tracker.log_images({"validation": np.stack(frames)}, step=step, dataformats="NHWC")
