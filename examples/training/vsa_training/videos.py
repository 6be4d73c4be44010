"""Captioned videos on disk."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import torch
import torch.nn.functional as F

SUFFIXES = (".avi", ".gif", ".mkv", ".mov", ".mp4", ".webm")
METADATA_NAME = "metadata.jsonl"
CAPTION_KEYS = ("text", "caption", "prompt")


@dataclass(frozen=True)
class Clip:
    """The `number`-th stretch of a video."""

    path: Path
    caption: str
    number: int = 0


def find_clips(folder: Path, num_frames: int, fps: float, clips_per_video: int) -> list[Clip]:
    """Every clip in the folder's videos, in the order of their names.

    Raises:
        ValueError: there are no videos, or one has no caption, is too short, or cannot be read.
    """
    if not folder.is_dir():
        raise ValueError(f"data_dir={folder}: no such directory; give the folder with the videos.")
    captions = read_captions(folder)
    if not captions:
        raise ValueError(f"data_dir={folder} holds no videos ({', '.join(SUFFIXES)}).")
    clips = []
    for path, caption in captions.items():
        seconds = _facts(path)["duration"]
        # Containers round their duration, and the last frame lasts, too.
        whole = math.floor((seconds * fps + 1.5) / num_frames)
        if whole < 1:
            raise ValueError(
                f"{path} lasts {seconds:.2f} s, less than {num_frames} frames at {fps:g} per second; leave it out, or "
                "ask for shorter clips."
            )
        clips += [Clip(path, caption, number) for number in range(min(whole, clips_per_video))]
    return clips


def read_captions(folder: Path) -> dict[Path, str]:
    """From each video to its caption: out of `metadata.jsonl`, or of a text file of the video's name."""
    metadata = folder / METADATA_NAME
    if metadata.exists():
        lines = metadata.read_bytes().splitlines()
        rows = [_row(line, f"{metadata}, line {place}") for place, line in enumerate(lines, 1) if line.strip()]
        return {folder / row["file_name"]: _caption(row, metadata) for row in rows}
    captions = {}
    for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES):
        beside = path.with_suffix(".txt")
        if not beside.exists():
            raise ValueError(
                f"{path} has no caption; write {beside.name} beside it, or {METADATA_NAME} for all videos."
            )
        captions[path] = beside.read_text().strip()
    return captions


def _row(line: bytes, where: str) -> dict:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON ({error}); write one object a line.") from error
    if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
        raise ValueError(f'{where} has no "file_name"; write {{"file_name": "a.mp4", "text": "..."}}.')
    return row


def _facts(path: Path) -> dict:
    """Duration and frames per second, among others."""
    try:
        return imageio.immeta(path, plugin="FFMPEG")
    except Exception as error:
        # Whatever FFMPEG's plugin raises: OSError, IndexError, RuntimeError.
        raise ValueError(f"{path} cannot be read as a video ({error}); mend it or leave it out.") from error


def _caption(row: dict, metadata: Path) -> str:
    for key in CAPTION_KEYS:
        if isinstance(row.get(key), str):
            return row[key]
    raise ValueError(f"{metadata} has no {' or '.join(CAPTION_KEYS)} for {row.get('file_name')}.")


def read_clip(clip: Clip, num_frames: int, fps: float, height: int, width: int) -> torch.Tensor:
    """Frames `[1, 3, num_frames, height, width]` in -1 to 1: sampled in time, scaled, cropped in the middle."""
    own_fps = _facts(clip.path)["fps"]
    first = clip.number * num_frames
    wanted = [round((first + place) * own_fps / fps) for place in range(num_frames)]
    frames = _frames(clip.path, wanted)
    video = torch.from_numpy(frames).movedim(-1, 1).float() / 127.5 - 1
    scale = max(height / video.shape[-2], width / video.shape[-1])
    size = [max(extent, round(own * scale)) for extent, own in zip((height, width), video.shape[-2:], strict=True)]
    video = F.interpolate(video, size, mode="bilinear", antialias=True).clamp(-1, 1)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return video[..., top : top + height, left : left + width].transpose(0, 1)[None]


def _frames(path: Path, wanted: list[int]) -> np.ndarray:
    """Frames `[len(wanted), height, width, 3]`; the last one stands in for up to two that are missing at the end."""
    places = set(wanted)
    found: dict[int, np.ndarray] = {}
    for place, frame in enumerate(imageio.imiter(path, plugin="FFMPEG")):
        if place in places:
            found[place] = frame[..., :3]
        if place >= wanted[-1]:
            break
    last = max(found)
    if wanted[-1] - place > 2:
        raise ValueError(f"{path} ends after {place + 1} frames, but frame {wanted[-1] + 1} is needed.")
    return np.stack([found[min(place, last)] for place in wanted])
