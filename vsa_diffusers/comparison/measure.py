"""One video, and what it took."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline

from ..config import VSAConfig
from ..generation.calling import Video, call_pipeline, number_of_steps, run_pipeline
from ..generation.sparsity import Config
from ..pipeline import disable_vsa, enable_vsa, enabled_config, supported_parts, unwrap


@dataclass(frozen=True)
class Measurement:
    """One video, and what it took.

    Args:
        video: as it came out.
        seconds: the pipeline's whole call.
        denoising: seconds from the transformer's first call to the end of its last.
        peak_memory: bytes that torch held on the GPU at once; `None` without a GPU.
    """

    video: Video
    seconds: float
    denoising: float
    peak_memory: int | None


@contextmanager
def attending(pipe: DiffusionPipeline, config: Config | None) -> Iterator[None]:
    """Within the block the pipeline attends by this config, or densely; after it, as it did before."""
    before = _enabled(pipe)
    disable_vsa(pipe)
    try:
        if config is not None:
            enable_vsa(pipe, config=config)
        yield
    finally:
        disable_vsa(pipe)
        if before is not None:
            enable_vsa(pipe, config=before)


def warm_up(pipe: DiffusionPipeline, arguments: Mapping[str, Any], seed: int, config: Config | None) -> None:
    """Call the pipeline, as it attends, with as few steps as have a dense and a sparse one, and without decoding."""
    steps = number_of_steps(pipe, arguments)
    few = {} if steps is None else {"num_inference_steps": min(steps, _steps_to_warm_up(config))}
    run_pipeline(pipe, {**arguments, **few}, seed, output_type="latent")


def measure(
    pipe: DiffusionPipeline,
    arguments: Mapping[str, Any],
    seed: int,
    *,
    fps: float | None = None,
    on_step: Callable[[], None] | None = None,
) -> Measurement:
    """Make one video, as the pipeline attends. Arguments and errors are those of `call_pipeline`."""
    on_gpu = torch.cuda.is_available() and getattr(pipe, "_execution_device", pipe.device).type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    with _Clock(pipe, on_gpu) as clock:
        begin = time.perf_counter()
        video = call_pipeline(pipe, arguments, seed, fps=fps, on_step=on_step)
        if on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
    return Measurement(video, seconds, clock.seconds(), torch.cuda.max_memory_allocated() if on_gpu else None)


class _Clock:
    """Reads the time before the transformers' first call and after their last, without waiting for the GPU."""

    def __init__(self, pipe: DiffusionPipeline, on_gpu: bool):
        self.on_gpu = on_gpu
        self.first: Any = None
        self.last: Any = None
        ours = {id(part) for part in supported_parts(pipe).values()}
        modules = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
        self.watched = [module for module in modules if id(unwrap(module)) in ours]
        self.handles: list[Any] = []

    def __enter__(self) -> _Clock:
        for module in self.watched:
            self.handles.append(module.register_forward_pre_hook(self._begin))
            self.handles.append(module.register_forward_hook(self._end))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()

    def seconds(self) -> float:
        if self.first is None or self.last is None:
            return math.nan
        return self.first.elapsed_time(self.last) / 1000 if self.on_gpu else self.last - self.first

    def _begin(self, *_: Any) -> None:
        if self.first is None:
            self.first = self._now()

    def _end(self, *_: Any) -> None:
        self.last = self._now()

    def _now(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _enabled(pipe: DiffusionPipeline) -> Config | None:
    try:
        return enabled_config(next(iter(supported_parts(pipe).values())))
    except ValueError:
        return None


def _steps_to_warm_up(config: Config | None) -> int:
    if config is None:
        return 1
    entries = [config.to_dict()] if isinstance(config, VSAConfig) else list(config.values())
    counts = [0]
    for entry in entries:
        dense = entry.get("dense_steps", 0) if isinstance(entry, Mapping) else 0
        # Of a share, so many steps that not all of them are dense.
        counts.append(dense if isinstance(dense, int) else math.ceil(1 / max(1 - dense, 1e-3)) - 1)
    return max(counts) + 1
