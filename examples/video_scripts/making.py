"""A pipeline called with VSA and, to compare, without: timed, written, and told."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from rich.console import Console
from rich.table import Table

from vsa_diffusers.generation.calling import run_pipeline
from vsa_diffusers.generation.loading import compile_blocks, load_pipeline, place
from vsa_diffusers.video_files import check_video_path, video_frames, write_video


@dataclass(frozen=True)
class Made:
    """What one call made: its name, seconds, peak GPU memory in GiB (0 without a GPU), frames of the first video."""

    name: str
    seconds: float
    memory: float
    frames: np.ndarray
    files: list[Path]


def check_machine(device: str, output: Path) -> None:
    """Refuse what would fail only after the model was loaded, or after the video was made."""
    check_video_path(output)
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ValueError(f"device={device!r} is none that PyTorch knows; use cuda or cpu.") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={device!r}: PyTorch sees no GPU; add --device cpu for a small trial.")


def load(
    model: str, *, dtype: str, device: str, offload: str, output: Path, in_float32: Sequence[str] = ()
) -> DiffusionPipeline:
    """The pipeline in its place, with the components `in_float32` in that whatever `dtype` is."""
    check_machine(device, output)
    pipe = load_pipeline(model, dtype=dtype, device=device)
    for name in in_float32 if dtype != "float32" else ():
        cls = type(getattr(pipe, name))
        setattr(pipe, name, cls.from_pretrained(model, subfolder=name, dtype=torch.float32))
    place(pipe, device, offload)
    return pipe


def make_videos(
    pipe: DiffusionPipeline,
    enable: Callable[[], None] | None,
    arguments: Mapping[str, Any],
    *,
    seed: int,
    output: Path,
    fps: float,
    dense_output: Path | None = None,
    compiled: bool = False,
    sample_rate: int | None = None,
) -> None:
    """Make the video, and the dense one before it where that has a file; write them, and say what came out.

    Args:
        pipe: the pipeline, in its place.
        enable: makes it sparse; `None` leaves it dense.
        arguments: of the pipeline's call.
        seed: of the noise.
        output: the file; of a batch, every video gets its number behind the name.
        fps: frames per second.
        dense_output: the file of the dense video.
        compiled: compile the blocks.
        sample_rate: of the sound that the pipeline makes, to be written with the frames.

    Raises:
        ValueError: it does not fit into the GPU's memory, the call is refused, or no video comes out.
    """
    pipe.set_progress_bar_config(disable=False)
    runs = [] if dense_output is None else [("dense", None, dense_output)]
    runs.append(("dense", None, output) if enable is None else ("VSA", enable, output))
    made = []
    for name, prepare, path in runs:
        if prepare is not None:
            prepare()
        if compiled:
            compile_blocks(pipe)
        if len(runs) > 1:
            # Kernels are compiled by the first steps: one that may be dense, and one that is sparse.
            _call(pipe, arguments | {"num_inference_steps": 2}, seed, "latent")
        begin = time.perf_counter()
        result = _call(pipe, arguments, seed, "np")
        seconds, memory = time.perf_counter() - begin, _peak_memory()
        files, frames = _write(result, path, fps, sample_rate)
        made.append(Made(name, seconds, memory, frames, files))
    console = Console()
    if len(made) > 1:
        console.print(_table(made))
    for each in made:
        files = ", ".join(map(str, each.files))
        told = f"{each.name}: {files}, {len(each.frames)} frames in {each.seconds:.1f} s"
        console.print(told, highlight=False, markup=False, soft_wrap=True)


def beside(path: Path, word: str) -> Path:
    """A file name beside `path` with a word more."""
    return path.with_name(f"{path.stem}_{word}{path.suffix}")


def _call(pipe: DiffusionPipeline, arguments: Mapping[str, Any], seed: int, output_type: str) -> Mapping[str, Any]:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        return run_pipeline(pipe, arguments, seed, output_type=output_type)
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"The GPU's memory does not hold it ({error}); add --offload model, or make fewer frames or pixels."
        ) from error


def _peak_memory() -> float:
    if not torch.cuda.is_available():
        return 0.0
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 2**30


def _write(result: Mapping[str, Any], path: Path, fps: float, sample_rate: int | None) -> tuple[list[Path], np.ndarray]:
    """Write every video of a batch; returns the files, and the frames of the first."""
    videos = [video_frames(frames) for frames in result["frames"]]
    sounds = [None] * len(videos) if sample_rate is None else list(result["audio"])
    files = [path] if len(videos) == 1 else [beside(path, str(number)) for number in range(len(videos))]
    for file, video, sound in zip(files, videos, sounds, strict=True):
        write_video(file, video, fps, sound, None if sound is None else sample_rate)
    return files, videos[0]


def _table(made: list[Made]) -> Table:
    table = Table()
    for heading in ("", "seconds", "times dense", "PSNR to dense, dB", "GPU memory, GiB"):
        table.add_column(heading, justify="right" if heading else "left")
    for each in made:
        compared = each is not made[0]
        table.add_row(
            each.name,
            f"{each.seconds:.1f}",
            f"{made[0].seconds / each.seconds:.2f}x" if compared else "",
            _psnr(each.frames, made[0].frames) if compared else "",
            f"{each.memory:.1f}" if each.memory else "",
        )
    return table


def _psnr(frames: np.ndarray, reference: np.ndarray) -> str:
    error = np.mean((frames.astype(np.float64) - reference) ** 2)
    return f"{10 * np.log10(255**2 / error):.1f}" if error else "identical"
