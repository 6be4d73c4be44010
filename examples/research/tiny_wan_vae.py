"""The tiny VAE: how it is trained, how good it is, and the latents of captioned clips that it makes."""

import random
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d
from procedural_video import Scene, View, render, render_batch, sample_scene, view
from torch import nn

from tiny_wan_parts import LATENT_CHANNELS, build_vae
from tiny_wan_training import TrainingRun, autocast, progress_bar

# (side, frames) of the clips that crops are cut from, and how often: the sizes that the transformer trains on.
CLIP_SIZES = {(256, 61): 0.6, (128, 61): 0.15, (128, 29): 0.15, (64, 29): 0.1}


def sample_crop(seed: int, side: int, frames: int) -> tuple[Scene, View]:
    """A piece of a random clip; every other one holds the main object."""
    rng = random.Random(f"crop-{seed}")
    scene = sample_scene(seed)
    sizes = {size: weight for size, weight in CLIP_SIZES.items() if size[0] >= side and size[1] >= frames}
    clip_side, clip_frames = rng.choices(list(sizes), weights=list(sizes.values()))[0]
    first = rng.randint(0, clip_frames - frames)
    corner = _corner(rng, scene, clip_side, side, when=(first + frames / 2) / clip_frames)
    window = (slice(first, first + frames), *(slice(start, start + side) for start in corner))
    return scene, view(clip_side, clip_side, clip_frames, window)


def _corner(rng: random.Random, scene: Scene, clip_side: int, side: int, when: float) -> tuple[int, int]:
    """Top and left of the crop."""
    if rng.random() < 0.5:
        return rng.randint(0, clip_side - side), rng.randint(0, clip_side - side)
    body = scene.main
    x, y = (
        start + travel * when + rng.uniform(-1.0, 1.0) * body.radius
        for start, travel in zip(body.start, body.travel, strict=True)
    )
    top, left = (round(centre * clip_side - side / 2) for centre in (y, x))
    return min(max(top, 0), clip_side - side), min(max(left, 0), clip_side - side)


class PresentConv(nn.Module):
    """A causal 3x3x3 convolution without its past: only the present frame's 3x3 slice exists.

    Time then mixes only where the VAE changes its frame rate. What is learnt on short crops holds for clips of any
    length, which it does not where thirty frames of history reach every output, and training costs a third.
    """

    def __init__(self, conv: WanCausalConv3d):
        super().__init__()
        self.weight = nn.Parameter(conv.weight.detach()[:, :, -1:].clone())
        self.bias = nn.Parameter(conv.bias.detach().clone())

    def forward(self, x: torch.Tensor, cache_x: torch.Tensor | None = None) -> torch.Tensor:
        return F.conv3d(x, self.weight, self.bias, padding=(0, 1, 1))

    def with_past(self) -> WanCausalConv3d:
        """The stock layer that does the same."""
        conv = WanCausalConv3d(self.weight.shape[1], self.weight.shape[0], 3, padding=1).to(self.weight.device)
        with torch.no_grad():
            conv.weight.zero_()[:, :, -1:].copy_(self.weight)
            conv.bias.copy_(self.bias)
        return conv


def without_past(vae: AutoencoderKLWan) -> AutoencoderKLWan:
    """The VAE to train, in place."""
    return _replace(vae, WanCausalConv3d, lambda conv: PresentConv(conv) if conv.kernel_size == (3, 3, 3) else conv)


def with_past(vae: AutoencoderKLWan) -> AutoencoderKLWan:
    """The stock VAE again, in place."""
    return _replace(vae, PresentConv, PresentConv.with_past)


def _replace(vae: AutoencoderKLWan, kind: type, new: Callable[[nn.Module], nn.Module]) -> AutoencoderKLWan:
    for name, module in list(vae.named_modules()):
        if isinstance(module, kind):
            parent, _, child = name.rpartition(".")
            setattr(vae.get_submodule(parent), child, new(module))
    return vae


def reconstruction_loss(video: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L1 on pixels and on their differences, which keeps outlines sharp."""
    loss = F.l1_loss(video, target)
    for dim in (2, 3, 4):
        loss = loss + 0.5 * F.l1_loss(video.diff(dim=dim), target.diff(dim=dim))
    return loss


def train_vae(
    folder: Path,
    device: torch.device,
    *,
    minutes: float,
    call_minutes: float | None,
    batch_size: int,
    crop: int,
    frames: int,
    lr: float,
    kl_weight: float = 5e-4,
    measured_clips: int = 24,
) -> AutoencoderKLWan | None:
    """Train on crops of freshly rendered clips. Returns the finished VAE, or None when time ran out before."""
    torch.manual_seed(0)
    vae = without_past(build_vae()).to(device)
    run = TrainingRun(
        folder, vae, lr=lr, minutes=minutes, call_minutes=call_minutes, adamw_only=("conv_in", "conv_out")
    )
    with progress_bar("VAE", run) as report:
        while not run.out_of_time:
            seeds = range(run.step * batch_size, (run.step + 1) * batch_size)
            scenes, views = zip(*(sample_crop(seed, crop, frames) for seed in seeds), strict=True)
            video = render_batch(scenes, views, device=device)
            with autocast(device):
                posterior = vae.encode(video).latent_dist
                output = vae.decode(posterior.sample()).sample.float()
            kl = 0.5 * (posterior.mean**2 + posterior.var - 1.0 - posterior.logvar).float().mean()
            loss = reconstruction_loss(output, video)
            (loss + kl_weight * kl).backward()
            run.update()
            mse = F.mse_loss(output.detach(), video)
            report(loss=loss.detach(), kl=kl.detach(), psnr=10 * torch.log10(4 / mse))
    run.save()
    if not run.finished:
        return None
    run.average.copy_to_module()
    return with_past(measure_latents(vae, device, measured_clips))


@torch.no_grad()
def measure_latents(vae: AutoencoderKLWan, device: torch.device, clips: int) -> AutoencoderKLWan:
    """Write the latents' mean and standard deviation, per channel, into the VAE's configuration.

    Of samples, not modes: a channel that is mostly noise to the decoder stays small for the transformer too.
    """
    scenes = [sample_scene(seed) for seed in range(clips)]
    latents = encode_scenes(vae, scenes, 128, 61, device, sample=True)
    flat = latents.float().transpose(0, 1).reshape(LATENT_CHANNELS, -1)
    vae.register_to_config(
        latents_mean=[round(value, 4) for value in flat.mean(1).tolist()],
        latents_std=[round(value, 4) for value in flat.std(1).tolist()],
    )
    return vae


@torch.no_grad()
def encode_scenes(
    vae: AutoencoderKLWan, scenes: list[Scene], side: int, frames: int, device: torch.device, sample: bool = False
) -> torch.Tensor:
    """Latents `[scenes, channels, 1 + frames // 4, side / 8, side / 8]`, not normalised."""
    at_once = max(1, (2**25 if device.type == "cuda" else 2**22) // (frames * side**2))
    latents = []
    for first in range(0, len(scenes), at_once):
        chosen = scenes[first : first + at_once]
        video = render_batch(chosen, [view(side, side, frames)] * len(chosen), device=device)
        with autocast(device):
            posterior = vae.encode(video).latent_dist
        latents.append((posterior.sample() if sample else posterior.mode()).float())
    return torch.cat(latents)


@torch.no_grad()
def reconstruction_psnr(
    vae: AutoencoderKLWan, device: torch.device, clips: int, side: int = 256, frames: int = 61
) -> float:
    """Mean PSNR in dB, for pixels in 0 to 1, over clips of held-out captions."""
    scores = []
    for seed in range(clips):
        video = render(sample_scene(seed, split="held_out"), side, side, frames, device=device)[None]
        decoded = vae.decode(vae.encode(video).latent_dist.mode()).sample
        scores.append(10 * torch.log10(4 / F.mse_loss(decoded, video)))
    return torch.stack(scores).mean().item()
