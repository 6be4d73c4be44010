"""Videos from a transformer alone: the loop of a pipeline, for models without a text encoder or a VAE."""

from __future__ import annotations

import copy
from typing import Any

import torch


@torch.no_grad()
def sample(
    transformer: torch.nn.Module,
    scheduler: Any,
    noise: torch.Tensor,
    prompts: torch.Tensor,
    steps: int,
    negative: torch.Tensor | None = None,
    guidance: float = 1.0,
) -> torch.Tensor:
    """Denoise a batch, as `WanPipeline` does: with guidance above 1 the transformer is called twice a step.

    Args:
        transformer: called as Wan's is.
        scheduler: of diffusers, for flow matching; a copy of it is used.
        noise: `[videos, channels, frames, height, width]`, fp32.
        prompts: embeddings `[videos, tokens, channels]`.
        steps: of denoising.
        negative: what guidance leads away from, of the shape of `prompts`.
        guidance: its scale.

    Returns:
        Latents of the shape of `noise`, fp32.
    """
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(steps, device=noise.device)
    timesteps, latents, dtype = scheduler.timesteps, noise, transformer.dtype

    def velocity(t: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        return transformer(latents.to(dtype), t.expand(len(latents)), embeds.to(dtype), return_dict=False)[0]

    # Named as in the pipelines: from this loop dense steps and schedules learn which step it is.
    for i, t in enumerate(timesteps):  # noqa: B007
        predicted = velocity(t, prompts)
        if negative is not None and guidance > 1:
            unconditional = velocity(t, negative)
            predicted = unconditional + guidance * (predicted - unconditional)
        latents = scheduler.step(predicted, t, latents, return_dict=False)[0]
    return latents
