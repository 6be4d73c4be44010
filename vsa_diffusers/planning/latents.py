"""From a video in pixels to the grid of tokens that a transformer sees, by the code that reads it at run time."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from ..models import Family
from ..models.family import Grid

Extents = tuple[int, int, int]
WINDOW, CHUNK, LATENTS_OF_CHUNK = 9, 17, 5


def plain(frames: int, ratio: int) -> int:
    """The first frame has a latent frame of its own."""
    return (frames - 1) // ratio + 1


def rounded(frames: int, ratio: int) -> int:
    """The same, of pipelines that round to frames which fill the others."""
    return plain(frames if frames % ratio == 1 else frames // ratio * ratio + 1, ratio)


def even(frames: int, ratio: int) -> int:
    """Even numbers of frames are taken whole."""
    return math.ceil(frames / ratio) if frames % 2 == 0 else math.ceil((frames - 1) / ratio) + 1


def with_reference(frames: int, ratio: int) -> int:
    """The character stands before the video."""
    return rounded(frames, ratio) + 1


def windows(frames: int, ratio: int) -> int:
    """So many latent frames are made at a time; what came before them attends densely."""
    return WINDOW


def chunks(frames: int, ratio: int) -> int:
    """Rounded up to 17 n + 5 frames, which are 5 n + 2 latent frames."""
    return math.ceil(max(0, frames - LATENTS_OF_CHUNK) / CHUNK) * LATENTS_OF_CHUNK + 2


# How frames become latent frames, by the family's name; `plain` for the others.
_LATENT_FRAMES: dict[str, Callable[[int, int], int]] = {
    "Allegro": even,
    "AnyFlow": rounded,
    "ChronoEdit": rounded,
    "Helios": windows,
    "HunyuanVideo Framepack": windows,
    "Kandinsky 5": rounded,
    "Kandinsky 6": rounded,
    "MiniMax-H3": chunks,
    "SkyReels-V2": rounded,
    "Wan": rounded,
    "Wan Animate": with_reference,
}


def latent_extents(family: Family, config: Any, size: Extents, vae: tuple[int, int]) -> Extents:
    """Latent frames, height and width of a video `(height, width, frames)`, as its pipeline makes them."""
    height, width, frames = size
    ratio, space = vae
    count = _LATENT_FRAMES.get(family.name, plain)(frames, ratio)
    # CogVideoX 1.5 pads its latents to whole patches.
    patch_t = config.get("patch_size_t") or 1
    return -(-count // patch_t) * patch_t, height // space, width // space


def _channels_second(latents: Extents, config: Any) -> dict[str, Any]:
    return {"hidden_states": torch.empty(1, 1, *latents, device="meta")}


def _frames_second(latents: Extents, config: Any) -> dict[str, Any]:
    frames, height, width = latents
    return {"hidden_states": torch.empty(1, frames, 1, height, width, device="meta")}


def _channels_last(latents: Extents, config: Any) -> dict[str, Any]:
    return {"hidden_states": torch.empty(1, *latents, 1, device="meta")}


def _extents(latents: Extents, config: Any) -> dict[str, Any]:
    frames, height, width = latents
    flat = torch.empty(1, math.prod(latents), 1, device="meta")
    return {"hidden_states": flat, "num_frames": frames, "height": height, "width": width}


def _cosmos3(latents: Extents, config: Any) -> dict[str, Any]:
    frames, height, width = latents
    patch = config["latent_patch_size"]
    return {
        "vision_token_shapes": [(frames, -(-height // patch), -(-width // patch))],
        "vision_sequence_indexes": torch.zeros(1, dtype=torch.long),
        "und_len": 0,
    }


def _minimax_h3(latents: Extents, config: Any) -> dict[str, Any]:
    axes = [torch.arange(extent // patch) for extent, patch in zip(latents, config["patch_size"], strict=True)]
    positions = torch.cartesian_prod(*axes).float()
    return {"video_indices": torch.arange(len(positions)), "position_ids": positions}


# How each family's pipelines hand over the latents, by the family's name; the others have channels second.
_INPUTS: dict[str, Callable[[Extents, Any], dict[str, Any]]] = {
    "AnyFlow": _frames_second,
    "CogVideoX": _frames_second,
    "Cosmos 3": _cosmos3,
    "Kandinsky 5": _channels_last,
    "Kandinsky 6": _channels_last,
    "LTX-2": _extents,
    "LTX-Video": _extents,
    "MiniMax-H3": _minimax_h3,
}


def token_grid(family: Family, config: Any, latents: Extents) -> Grid:
    """The grid `(T, H, W)` of video tokens that the family reads from a forward on these latents.

    Raises:
        ValueError: they make none; the message says why.
    """
    inputs = _INPUTS.get(family.name, _channels_second)(latents, config)
    grid, reason = family.grid(SimpleNamespace(config=config), inputs)
    if grid is None:
        raise ValueError(
            f"latents of {'x'.join(map(str, latents))} make no grid of tokens for {family.name}: {reason}."
        )
    return grid
