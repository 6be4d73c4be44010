"""Flow matching: noise levels, noisy samples, and what the transformer should predict."""

from __future__ import annotations

import torch


def shift_sigmas(sigmas: torch.Tensor, shift: float) -> torch.Tensor:
    """Noise levels in 0 to 1 moved towards noise, as the schedulers of diffusers do for large grids."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def logit_normal_quantiles(quantiles: torch.Tensor, shift: float, mean: float = 0.0, std: float = 1.0) -> torch.Tensor:
    """Noise levels whose logit is normal (arXiv 2403.03206, section 3.1), at these quantiles, then shifted."""
    return shift_sigmas(torch.sigmoid(mean + std * torch.special.ndtri(quantiles)), shift)


def add_noise(clean: torch.Tensor, noise: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    """`(1 - sigma) * clean + sigma * noise`, with one sigma per batch item."""
    return torch.lerp(clean, noise, sigmas.view(-1, *[1] * (clean.ndim - 1)).to(clean.dtype))


def velocity_error(prediction: torch.Tensor, clean: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Squared error of the predicted velocity `noise - clean`, one mean per batch item."""
    return (prediction.float() - (noise - clean).float()).square().flatten(1).mean(1)
