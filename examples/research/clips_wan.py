"""The clips model: a small Wan transformer on the pixels of a few real clips, without a VAE or a text encoder.

A token is 4x4 pixels of one frame, and the prompt the clip's number. The last frames of each clip are never trained on.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import imageio.v3 as imageio
import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from safetensors.torch import save_file

from tiny_wan_parts import build_scheduler
from vsa_diffusers.files import read_json, read_tensors, replaced_file

Grid = tuple[int, int, int]
CLIPS, HELD_OUT_TENSORS = "clips.json", "held_out.safetensors"
PATCH = 4  # pixels
HEIGHT = 144  # that clips are resized to; widths follow, in whole patches
HELD_OUT_FRAMES = 32
PROMPT_WIDTH = 16
SHIFT = 3.0  # of the noise levels, in training, as the scheduler has it
SUFFIXES = (".mp4", ".webp")


@dataclass(frozen=True)
class Clip:
    """Frames `[frames, 3, height, width]`, uint8; the last `HELD_OUT_FRAMES` of a whole clip are held out."""

    name: str
    frames: torch.Tensor

    @property
    def trained_on(self) -> torch.Tensor:
        return self.frames[:-HELD_OUT_FRAMES]

    @property
    def held_out(self) -> torch.Tensor:
        return self.frames[-HELD_OUT_FRAMES:]


def read_clips(folder: Path) -> list[Clip]:
    """Every video and animated WebP in a folder, in the order of their names, `HEIGHT` pixels high.

    Raises:
        ValueError: there is none, there are more than a prompt can tell apart, two share a name, or one is too short.
    """
    paths = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)
    if not 0 < len(paths) <= PROMPT_WIDTH:
        raise ValueError(
            f"{folder} has {len(paths)} files that end in {' or '.join(SUFFIXES)}; put 1 to {PROMPT_WIDTH} there."
        )
    names = [path.stem for path in paths]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{folder} has several files named {', '.join(twice)} but for their ends; rename all but one.")
    clips = [Clip(path.stem, _resized(imageio.imread(path, index=...))) for path in paths]
    for clip, path in zip(clips, paths, strict=True):
        if len(clip.frames) < 2 * HELD_OUT_FRAMES:
            raise ValueError(f"{path} has {len(clip.frames)} frames; clips need {2 * HELD_OUT_FRAMES} or more.")
    return clips


def _resized(frames) -> torch.Tensor:
    """From `[frames, height, width, channels]`, uint8."""
    pixels = torch.from_numpy(frames[..., :3]).permute(0, 3, 1, 2)
    width = PATCH * round(pixels.shape[3] * HEIGHT / pixels.shape[2] / PATCH)
    if pixels.shape[2:] == (HEIGHT, width):
        return pixels
    parts = [F.interpolate(part, size=(HEIGHT, width), mode="bilinear", antialias=True) for part in pixels.split(32)]
    return torch.cat(parts)


def check_fits(frames: torch.Tensor, grid: Grid) -> tuple[Grid, Grid]:
    """Frames, height and width that windows of a grid take, and those that a clip has.

    Raises:
        ValueError: the clip is smaller.
    """
    taken = (grid[0], PATCH * grid[1], PATCH * grid[2])
    available = (frames.shape[0], *frames.shape[2:])
    if any(wanted > there for wanted, there in zip(taken, available, strict=True)):
        raise ValueError(
            f"grid={grid} takes {taken} frames and pixels of a clip that has {available}; make it smaller, or leave "
            "the clip out."
        )
    return taken, available


def window(frames: torch.Tensor, grid: Grid, rng: random.Random) -> torch.Tensor:
    """A random crop in space and time of so many tokens: `[3, T, 4 H, 4 W]` in [-1, 1].

    Raises:
        ValueError: the clip is smaller.
    """
    size, available = check_fits(frames, grid)
    t, y, x = (rng.randint(0, there - wanted) for wanted, there in zip(size, available, strict=True))
    crop = frames[t : t + size[0], :, y : y + size[1], x : x + size[2]]
    return crop.transpose(0, 1).float() / 127.5 - 1


def windows(clips: Sequence[torch.Tensor], picks: Sequence[int], grid: Grid, rng: random.Random) -> torch.Tensor:
    """A batch of windows, one of the frames of each clip picked."""
    return torch.stack([window(clips[pick], grid, rng) for pick in picks])


def prompts(picks: Sequence[int | None]) -> torch.Tensor:
    """Embeddings `[videos, 1, channels]` that tell the clip; zeros for `None`, any clip."""
    embeds = torch.zeros(len(picks), 1, PROMPT_WIDTH)
    for row, pick in enumerate(picks):
        if pick is not None:
            embeds[row, 0, pick] = 1
    return embeds


def build_clips_transformer(layers: int = 6, heads: int = 3) -> WanTransformer3DModel:
    """Untrained; a prediction of zeros to begin with."""
    width = 128 * heads
    transformer = WanTransformer3DModel(
        patch_size=(1, PATCH, PATCH),
        num_attention_heads=heads,
        attention_head_dim=128,
        in_channels=3,
        out_channels=3,
        text_dim=PROMPT_WIDTH,
        freq_dim=256,
        ffn_dim=4 * width,
        num_layers=layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
    )
    torch.nn.init.zeros_(transformer.proj_out.weight)
    return transformer


def save_clips_model(folder: Path, transformer: WanTransformer3DModel, clips: Sequence[Clip], steps: int) -> None:
    """Transformer and scheduler as diffusers writes them, the held-out frames, and what it was trained on."""
    # Half the size on disk; it is loaded in the dtype that is asked for.
    copy.deepcopy(transformer).half().save_pretrained(folder / "transformer")
    build_scheduler().save_pretrained(folder / "scheduler")
    with replaced_file(folder / HELD_OUT_TENSORS) as partial:
        save_file({clip.name: clip.held_out.cpu().contiguous() for clip in clips}, partial)
    told = {clip.name: {"frames_trained_on": len(clip.trained_on), "size": clip.frames.shape[2:]} for clip in clips}
    with replaced_file(folder / CLIPS) as partial:
        partial.write_text(json.dumps({"training_steps": steps, "clips": told}, indent=2) + "\n")


def read_description(folder: Path) -> dict:
    """What `save_clips_model` says of training: `training_steps`, and `clips` by name."""
    return read_json(folder / CLIPS)


def read_held_out(folder: Path) -> list[torch.Tensor]:
    """The held-out frames of each clip, in the order of their prompts."""
    tensors = read_tensors(folder / HELD_OUT_TENSORS)
    return [tensors[name] for name in read_description(folder)["clips"]]
