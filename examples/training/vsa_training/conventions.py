"""What a pipeline feeds its transformer, learnt from the pipeline itself instead of written down for each family.

A call of the pipeline is stopped at its first use of the transformer; what the transformer would have got besides the
noisy latents (text, masks, sizes, image channels) is the condition to train with. `check_conventions` then proves that
latents, noise and timesteps are understood: with a transformer that knows the answer, the pipeline must give back the
clip as its VAE decodes it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.models.modeling_outputs import Transformer2DModelOutput

from vsa_diffusers.pipeline import supported_parts

NOT_CONDITIONS = ("hidden_states", "timestep", "return_dict", "attention_kwargs")
TOLERANCE = 0.05


@dataclass(frozen=True)
class Layout:
    """How latents `[batch, channels, frames, height, width]` become `hidden_states`, and where channels are then."""

    channel_axis: int = 1
    arrange: Callable[[DiffusionPipeline, torch.Tensor], torch.Tensor] = lambda pipe, latents: latents


LAYOUTS = {
    "Kandinsky5Transformer3DModel": Layout(-1, lambda pipe, latents: latents.movedim(1, -1)),
    "LTXVideoTransformer3DModel": Layout(
        -1,
        lambda pipe, latents: pipe._pack_latents(
            latents, pipe.transformer_spatial_patch_size, pipe.transformer_temporal_patch_size
        ),
    ),
}


def layout_of(transformer: torch.nn.Module) -> Layout:
    """The layout of this class; most keep latents as they are."""
    return LAYOUTS.get(type(transformer).__name__, Layout())


def to_layout(pipe: DiffusionPipeline, latents: torch.Tensor) -> torch.Tensor:
    """Latents `[batch, channels, frames, height, width]` as the pipeline's transformer takes them."""
    return layout_of(next(iter(supported_parts(pipe).values()))).arrange(pipe, latents)


@dataclass
class Inputs:
    """What the transformer was called with, at noise level 1.

    Args:
        conditions: arguments besides `NOT_CONDITIONS`, by name.
        extra_channels: of `hidden_states`, those behind the noisy ones, or `None`.
        timestep_scale: what the timestep was, divided by the scheduler's (0 to 1000).
    """

    conditions: dict[str, Any]
    extra_channels: torch.Tensor | None
    timestep_scale: torch.Tensor


class _Stopped(Exception):
    def __init__(self, inputs: dict[str, Any]):
        super().__init__()
        self.inputs = inputs


def capture_inputs(pipe: DiffusionPipeline, call: dict[str, Any], clean: torch.Tensor) -> Inputs:
    """What a call of the pipeline with these arguments would feed its transformer besides noisy latents.

    Args:
        call: arguments of the pipeline.
        clean: latents in the transformer's layout, for their sizes.

    Raises:
        ValueError: the transformer takes latents in another layout, or no timestep in proportion to the scheduler's.
    """

    def stop(transformer, args, kwargs):
        parameters = list(inspect.signature(type(transformer).forward).parameters)[1:]
        raise _Stopped(dict(zip(parameters, args, strict=False)) | kwargs)

    parts = list(supported_parts(pipe).values())
    hooks = [part.register_forward_pre_hook(stop, with_kwargs=True) for part in parts]
    try:
        with torch.no_grad():
            pipe(**call | _unguided(pipe, call) | {"num_inference_steps": 2})
        raise ValueError(f"{type(pipe).__name__} finished without calling a transformer that VSA supports.")
    except _Stopped as stopped:
        inputs = stopped.inputs
    finally:
        for hook in hooks:
            hook.remove()
        pipe.maybe_free_model_hooks()
    axis = layout_of(parts[0]).channel_axis
    channels = clean.shape[axis]
    hidden = inputs.get("hidden_states")
    sizes = None if hidden is None else tuple(hidden.narrow(axis, 0, min(channels, hidden.shape[axis])).shape)
    if sizes != clean.shape:
        raise ValueError(
            f"{type(pipe).__name__} feeds its transformer hidden_states of {sizes and tuple(hidden.shape)}, where "
            f"{tuple(clean.shape)} was expected; this script does not know the layout."
        )
    scale = inputs["timestep"].float() / float(pipe.scheduler.timesteps[0])
    if not scale.all():
        raise ValueError(
            f"{type(pipe).__name__} passes timesteps that are not proportional to its scheduler's; this script cannot "
            "train its transformer."
        )
    return Inputs(
        conditions={name: value for name, value in inputs.items() if name not in NOT_CONDITIONS},
        extra_channels=hidden.narrow(axis, channels, hidden.shape[axis] - channels)
        if hidden.shape[axis] > channels
        else None,
        timestep_scale=scale,
    )


def _unguided(pipe: DiffusionPipeline, call: dict[str, Any]) -> dict[str, Any]:
    """Without classifier-free guidance, unless the caller wants a value, which some models embed."""
    guider = getattr(pipe, "guider", None)
    if guider is not None and hasattr(guider, "guidance_scale"):
        guider.guidance_scale = 1.0
    takes_scale = "guidance_scale" in inspect.signature(pipe.__call__).parameters
    return {"guidance_scale": 1.0} if takes_scale and "guidance_scale" not in call else {}


@torch.no_grad()
def encode(pipe: DiffusionPipeline, video: torch.Tensor) -> torch.Tensor:
    """Normalised latents `[1, channels, frames, height, width]`, fp32, of a clip `[1, 3, frames, height, width]`."""
    latents = pipe.vae.encode(video.to(pipe._execution_device, pipe.vae.dtype)).latent_dist.mode().float()
    mean, std, scale = _latent_statistics(pipe.vae, latents)
    return (latents - mean) * scale / std


@torch.no_grad()
def decode(pipe: DiffusionPipeline, latents: torch.Tensor) -> torch.Tensor:
    """The clip `[frames, 3, height, width]` in 0 to 1 that normalised latents stand for."""
    mean, std, scale = _latent_statistics(pipe.vae, latents)
    raw = (latents * std / scale + mean).to(pipe.vae.dtype)
    conditioned = getattr(pipe.vae.config, "timestep_conditioning", False)
    timestep = [torch.zeros(1, device=raw.device, dtype=raw.dtype)] if conditioned else []
    video = pipe.vae.decode(raw, *timestep, return_dict=False)[0]
    return (video[0].float().transpose(0, 1) / 2 + 0.5).clamp(0, 1)


def _latent_statistics(vae: torch.nn.Module, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Mean and standard deviation per channel, and a factor; 0 and 1 where a VAE has none."""

    def per_channel(name: str, default: float) -> torch.Tensor:
        values = vae.config.get(name)
        values = dict(vae.named_buffers()).get(name) if values is None else values
        values = torch.as_tensor(default if values is None else values).to(latents)
        if values.numel() not in (1, latents.shape[1]):
            raise ValueError(
                f"{type(vae).__name__} has {values.numel()} {name} for {latents.shape[1]} channels; this script does "
                "not know its normalisation."
            )
        return values.reshape(1, -1, 1, 1, 1)

    factor = vae.config.get("scaling_factor")
    return per_channel("latents_mean", 0.0), per_channel("latents_std", 1.0), 1.0 if factor is None else factor


@dataclass(frozen=True)
class SizeUnits:
    """Heights and widths are multiples of `height` and `width`, frames are one more than a multiple of `frames`."""

    height: int
    width: int
    frames: int

    @classmethod
    def of(cls, pipe: DiffusionPipeline) -> SizeUnits:
        """From the factors of the pipeline's VAE, and the patches of its transformer."""
        config = next(iter(supported_parts(pipe).values())).config
        patch = config.get("patch_size") or 1
        frames, *sides = patch if isinstance(patch, (list, tuple)) else (config.get("patch_size_t") or 1, patch, patch)
        spatial = _first(pipe, ("vae_scale_factor_spatial", "vae_spatial_compression_ratio", "vae_scale_factor"))
        temporal = _first(pipe, ("vae_scale_factor_temporal", "vae_temporal_compression_ratio"))
        return cls(spatial * sides[0], spatial * sides[-1], temporal * frames)

    def check(self, pipe: DiffusionPipeline, height: int, width: int, num_frames: int) -> None:
        """Raise `ValueError`, which names the nearest sizes that fit, if these are cut off somewhere on the way."""
        sizes = (("height", height, self.height, 0), ("width", width, self.width, 0))
        misfits = [
            f"{name}={value} (nearest: {_nearest(value, unit, rest)})"
            for name, value, unit, rest in (*sizes, ("num_frames", num_frames, self.frames, 1))
            if value < 1 or value % unit != rest % unit
        ]
        if misfits:
            raise ValueError(
                f"{' and '.join(misfits)} does not fit {type(pipe).__name__}, whose sizes are multiples of "
                f"{self.height} x {self.width} pixels and {self.frames}k + 1 frames."
            )


def _first(pipe: DiffusionPipeline, names: tuple[str, ...]) -> int:
    return int(next((value for name in names if (value := getattr(pipe, name, None))), 1))


def _nearest(value: int, unit: int, rest: int) -> str:
    """The multiples of `unit` plus `rest` around a value, from the smallest that is a size."""
    least = rest or unit
    below = max(least, (value - rest) // unit * unit + rest)
    above = max(least, below + unit if below <= value else below)
    return f"{below} or {above}" if below < above else str(below)


def scheduler_shift(pipe: DiffusionPipeline, tokens: int) -> float:
    """How far the pipeline's scheduler moves its noise levels towards noise, for a grid of so many tokens."""
    config = pipe.scheduler.config
    if config.get("use_dynamic_shifting"):
        base, most = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        return math.exp(base + (most - base) * (tokens - few) / (many - few))
    return float(config.get("shift") or config.get("flow_shift") or 1.0)


def check_conventions(pipe: DiffusionPipeline, call: dict[str, Any], latents: torch.Tensor, inputs: Inputs) -> None:
    """Prove that the pipeline's denoising is the flow matching that is trained, and that latents are normalised right.

    Args:
        call: arguments of the pipeline.
        latents: normalised, of a clip; see `encode`.
        inputs: captured for this call.

    Raises:
        ValueError: a transformer that knows the clip does not make the pipeline return it.
    """
    if not hasattr(pipe.scheduler, "sigmas"):
        raise ValueError(f"{type(pipe).__name__} denoises with {type(pipe.scheduler).__name__}, not by flow matching.")
    expected = decode(pipe, latents)
    with _all_knowing(pipe, to_layout(pipe, latents), inputs.timestep_scale), torch.no_grad():
        output = pipe(**call | _unguided(pipe, call) | dict(num_inference_steps=2, output_type="pt", return_dict=False))
    video = torch.as_tensor(output[0])[0].float().to(expected.device)
    error = math.inf
    if video.shape == expected.shape:
        error = float((video - expected).norm() / (expected - expected.mean()).norm())
    if not error < TOLERANCE:
        raise ValueError(
            f"{type(pipe).__name__} with {type(pipe.scheduler).__name__} does not denoise by the flow matching that is "
            f"trained here (velocity = noise - data): a perfect transformer leaves a relative error of {error:.2f}, "
            f"where {TOLERANCE} is allowed. If that is close, it may be rounding: try --dtype fp32."
        )


@contextmanager
def _all_knowing(pipe: DiffusionPipeline, clean: torch.Tensor, scale: torch.Tensor) -> Iterator[None]:
    """Every transformer of the pipeline answers with the velocity that leads to `clean`."""
    axis = layout_of(next(iter(supported_parts(pipe).values()))).channel_axis

    def forward_of(transformer):
        parameters = list(inspect.signature(type(transformer).forward).parameters)[1:]

        def forward(*args, **kwargs):
            inputs = dict(zip(parameters, args, strict=False)) | kwargs
            noisy = inputs["hidden_states"].float().narrow(axis, 0, clean.shape[axis])
            sigma = pipe.scheduler.sigmas[pipe.scheduler.step_index or 0].to(noisy)
            # Schedulers round timesteps to whole numbers; anything farther off is another convention.
            if (inputs["timestep"].float() / scale / 1000 - sigma).abs().max() > 2e-3:
                sigma = sigma * math.nan
            velocity = ((noisy - clean) / sigma).to(inputs["hidden_states"].dtype)
            return (velocity,) if inputs.get("return_dict") is False else Transformer2DModelOutput(velocity)

        return forward

    parts = supported_parts(pipe).values()
    own = [vars(part).get("forward") for part in parts]
    try:
        for part in parts:
            part.forward = forward_of(part)
        yield
    finally:
        for part, forward in zip(parts, own, strict=True):
            del part.forward
            if forward is not None:
                part.forward = forward
