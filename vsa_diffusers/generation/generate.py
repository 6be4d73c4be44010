"""One video by a pipeline that is loaded for it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..context_parallel import spread_over_gpus
from ..files import PathLike
from ..video_files import check_video_path, write_video
from .calling import Video, call_arguments, call_pipeline, number_of_steps, tells_steps
from .loading import check_place, compile_blocks, load_pipeline, pipeline_class, place, recommended_call
from .processes import is_first, is_one_of_several
from .progress import Progress
from .sparsity import check_sparse, make_sparse


@dataclass(frozen=True)
class Made:
    """What `generate` made: the video, its file, and the seconds of the pipeline's call."""

    video: Video
    path: Path
    seconds: float


def generate(
    model: PathLike,
    output: PathLike,
    arguments: Mapping[str, Any],
    *,
    seed: int | None = None,
    fps: float | None = None,
    dense: bool = False,
    changes: Mapping[str, Any] | None = None,
    config: PathLike | None = None,
    vsa: PathLike | None = None,
    lora: PathLike | None = None,
    gates: PathLike | None = None,
    dtype: str | None = None,
    device: str | None = None,
    offload: str = "none",
    compile: bool = False,
    guidance_parallel: bool = False,
    progress: Progress | None = None,
) -> Made:
    """Load a pipeline, make it sparse, call it, and write the video.

    Among processes that torchrun started, and that have joined, all make the video together, and the first writes it.

    Args:
        model, dtype, device, lora, gates: as in `load_pipeline`.
        output: the file, as in `write_video`; folders are made.
        arguments: of the pipeline's call, as in `call_arguments`; what is `None` is left to `recommended_call` and to
            the pipeline.
        seed: of the noise; `None` takes the recommended one, else 0.
        fps: frames per second; `None` takes the pipeline's.
        dense: leave VSA out.
        changes, config, vsa: as in `make_sparse`.
        offload: as in `place`.
        compile: compile the transformer's blocks.
        guidance_parallel: as in `spread_over_gpus`.
        progress: told of the denoising steps.

    Raises:
        ValueError, TypeError, OSError, ImportError: an argument or a file is wrong, or what comes out is no video;
            nothing is written then.
    """
    path, progress = check_video_path(output), progress or Progress()
    sparse = {"changes": changes, "config": config, "vsa": vsa}
    given = [name for name, value in sparse.items() if value]
    if dense and given:
        raise ValueError(f"dense together with {', '.join(given)}: a dense video has no such settings; leave one out.")
    if guidance_parallel and not is_one_of_several():
        raise ValueError("guidance_parallel=True needs several processes; start them with torchrun --nproc-per-node 2.")
    check_place(device, offload)
    progress.begin("loading", None)
    recommended, usual_seed = recommended_call(model)
    seed = usual_seed if seed is None else seed
    wanted = recommended | {name: value for name, value in arguments.items() if value is not None}
    cls = pipeline_class(model)
    if cls is not None:  # refused before loading rather than after
        call_arguments(cls, **wanted)
    check_sparse(changes or {}, config=config, vsa=vsa)
    pipe = load_pipeline(model, dtype=dtype, device=device, lora=lora, gates=gates)
    call = call_arguments(pipe, **wanted, fps=fps)
    if not dense:
        make_sparse(pipe, changes or {}, config=config, vsa=vsa)
    place(pipe, device, offload)
    if is_one_of_several():
        spread_over_gpus(pipe, guidance_parallel=guidance_parallel)
    if compile:
        compile_blocks(pipe)
    progress.begin("denoising", number_of_steps(pipe, call) if tells_steps(pipe) else None)
    begin = time.perf_counter()
    video = call_pipeline(pipe, call, seed, fps=fps, on_step=progress.step)
    seconds = time.perf_counter() - begin
    if is_first():
        write_video(path, video.frames, video.fps, video.audio, video.sample_rate)
    return Made(video, path, seconds)
