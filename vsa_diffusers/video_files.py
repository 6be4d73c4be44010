"""Videos as files: h264 that browsers and players show, with sound where there is some."""

from __future__ import annotations

import wave
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .files import PathLike, check_destination, replaced_file

if TYPE_CHECKING:
    from PIL.Image import Image

_SUFFIXES = (".mp4", ".mov", ".mkv")
_QUALITY = 7  # of imageio's 1 to 10; x264 calls it a rate factor of 15, which the eye takes for lossless
_ROUNDING = 1e-3
_BT709 = ["-vf", "scale=out_color_matrix=bt709:out_range=tv,setparams=color_primaries=bt709:color_trc=bt709"]


def write_video(
    path: PathLike,
    frames: np.ndarray | torch.Tensor | Sequence[Image],
    fps: float,
    audio: np.ndarray | torch.Tensor | None = None,
    sample_rate: int | None = None,
) -> None:
    """Write a video file, whole or not at all: h264 in yuv420p, which every browser plays, and AAC.

    Args:
        path: the file, `.mp4`, `.mov` or `.mkv`; one that is there is replaced, and folders that are missing are made.
        frames: as `video_frames` takes them. Odd heights and widths, which h264 cannot have, get one more row or column
            that repeats the last.
        fps: frames per second.
        audio: `[channels, samples]` or `[samples]`, in -1 to 1; what is beyond is clipped.
        sample_rate: samples per second of `audio`.

    Raises:
        ValueError: an argument is wrong, or frames or audio hold NaN or infinity; `path` is what it was then.
        OSError: the file cannot be written.
    """
    path = check_video_path(path)
    pixels = video_frames(frames)
    _, height, width, _ = pixels.shape
    pixels = np.pad(pixels, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    sound = None if audio is None else _samples(audio, sample_rate)
    path.parent.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {"quality": _QUALITY, "output_params": [*_BT709, "-movflags", "+faststart"]}
    with replaced_file(path) as partial:
        if sound is not None:
            options |= {"audio_path": str(partial.parent / "sound.wav"), "audio_codec": "aac"}
            _write_wave(partial.parent / "sound.wav", sound, int(sample_rate or 0))
        _encode(partial, pixels, fps, options)


def check_video_path(path: PathLike) -> Path:
    """The path itself, if `write_video` can make such a file there; else `ValueError`."""
    path = Path(path)
    if path.suffix.lower() not in _SUFFIXES:
        raise ValueError(f"{str(path)!r} ends in none of {', '.join(_SUFFIXES)}; name the video file so.")
    if path.is_dir():
        raise ValueError(f"{str(path)!r} is a directory; name a file in it.")
    return check_destination(path)


def write_lossless(path: PathLike, frames: np.ndarray | torch.Tensor | Sequence[Image], fps: float) -> None:
    """Write a `.mkv` (FFV1) from which `read_frames` gets each pixel as it was. Raises what `write_video` raises."""
    options: dict[str, Any] = {"codec": "ffv1", "quality": None}
    with replaced_file(path) as partial:
        _encode(partial, video_frames(frames), fps, options, pixel_format="gbrp")


def read_frames(path: PathLike) -> np.ndarray:
    """The frames of a video file, `[frames, height, width, 3]`, uint8."""
    import imageio.v3 as imageio

    return imageio.imread(Path(path), plugin="FFMPEG")


def video_frames(frames: np.ndarray | torch.Tensor | Sequence[Image]) -> np.ndarray:
    """Frames as pipelines return them, in the form that files hold: `[frames, height, width, 3]`, uint8.

    Args:
        frames: one video: `[frames, height, width, 3]` or `[frames, 3, height, width]`, floating point in 0 to 1 or
            uint8; or images, all of one size.

    Raises:
        ValueError: they are of another shape, or hold NaN, infinity, or values beyond their range.
    """
    if isinstance(frames, torch.Tensor):
        frames = frames.detach().cpu()
        pixels = (frames.float() if frames.is_floating_point() else frames).numpy()
    else:
        pixels = np.stack([np.asarray(frame) for frame in frames]) if len(frames) else np.empty(0)
    if pixels.ndim == 4 and pixels.shape[3] != 3 and pixels.shape[1] == 3:
        pixels = pixels.transpose(0, 2, 3, 1)
    if pixels.ndim != 4 or pixels.shape[3] != 3 or not pixels.size:
        raise ValueError(
            f"frames have the shape {list(pixels.shape)}; pass one video, [frames, height, width, 3] or images."
        )
    if pixels.dtype == np.uint8:
        return pixels
    if not np.issubdtype(pixels.dtype, np.floating):
        raise ValueError(f"frames are {pixels.dtype}; pass uint8, or floating point in 0 to 1.")
    if not np.isfinite(pixels).all():
        raise ValueError("frames hold NaN or infinity; use another dtype, or settings that are less sparse.")
    low, high = float(pixels.min()), float(pixels.max())
    if low < -_ROUNDING or high > 1 + _ROUNDING:
        raise ValueError(f"frames hold values from {low:.3g} to {high:.3g}; bring them to 0 to 1.")
    return np.rint(pixels.clip(0, 1) * 255).astype(np.uint8)


def _samples(audio: np.ndarray | torch.Tensor, sample_rate: int | None) -> np.ndarray:
    """16-bit samples `[samples, channels]`."""
    if not sample_rate or sample_rate < 1:
        raise ValueError(f"sample_rate={sample_rate}; audio needs its samples per second.")
    if isinstance(audio, torch.Tensor):
        audio = audio.detach().cpu().float().numpy()
    sound = np.atleast_2d(np.asarray(audio, dtype=np.float32))
    if sound.ndim != 2 or not sound.size:
        raise ValueError(f"audio has the shape {list(sound.shape)}; pass one sound, [channels, samples].")
    if not np.isfinite(sound).all():
        raise ValueError("audio holds NaN or infinity; use another dtype, or settings that are less sparse.")
    return np.rint(sound.T.clip(-1, 1) * 32767).astype("<i2")


def _write_wave(path: Path, sound: np.ndarray, sample_rate: int) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(sound.shape[1])
        file.setsampwidth(sound.dtype.itemsize)
        file.setframerate(sample_rate)
        file.writeframes(sound.tobytes())


def _encode(path: Path, pixels: np.ndarray, fps: float, options: dict[str, Any], pixel_format: str = "yuv420p") -> None:
    import imageio.v2 as imageio
    from imageio_ffmpeg import count_frames_and_secs

    if not 0 < fps < float("inf"):
        raise ValueError(f"fps={fps} is not a number of frames per second; pass one above 0.")
    writer = imageio.get_writer(
        path, format="FFMPEG", fps=fps, pixelformat=pixel_format, macro_block_size=1, ffmpeg_log_level="error",
        **options,
    )  # fmt: skip
    with writer:
        for frame in pixels:
            writer.append_data(frame)
    # The writer does not look how ffmpeg ended; on a full disk, for example, the file stops somewhere.
    written = count_frames_and_secs(path)[0] if path.exists() else 0
    if written != len(pixels):
        raise OSError(f"{path.name} got {written} of {len(pixels)} frames; see what ffmpeg said above.")
