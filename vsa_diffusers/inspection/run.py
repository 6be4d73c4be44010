"""`inspect_attention`: one dense video, of whose attention layers the operation tells what it would keep."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ..config import VSAConfig
from ..pipeline import enabled_config, install_vsa, supported_parts, vsa_unchanged
from ..problem import Problem
from ..processor import FamilyAttnProcessor
from ..schedule import RatioSchedule
from ..steps import position_in_run
from ..tiles import TileGrid, settle, whole, whole_numbers
from ..video_files import video_frames
from .observation import Layer, Observation, dense_output, measure, sampled_tiles, tile_of
from .result import Inspection

DEFAULT_RATIO = 0.2
DEFAULT_STEPS = 4
DEFAULT_QUERY_TILES = 16


def inspect_attention(
    pipe: Any,
    prompt: Any = None,
    ratio: float | None = None,
    *,
    config: VSAConfig | None = None,
    layers: Sequence[int] | None = None,
    steps: int | Sequence[int] = DEFAULT_STEPS,
    query: Sequence[int] | None = None,
    query_tiles: int = DEFAULT_QUERY_TILES,
    seed: int = 0,
    on_observation: Callable[[Observation], None] | None = None,
    **call: Any,
) -> Inspection:
    """Make a video densely, and measure at its layers what sparse attention would keep and lose.

    Every call of video self-attention passes the operation its query, key and value; some of these calls are measured,
    and all return the dense result. So each layer is judged by itself, on what the dense model gives it.

    Args:
        pipe: a diffusers pipeline, not compiled. What `enable_vsa` did to it stays; `dense_steps`, `dense_layers`
            and `schedule` are set aside: all layers and steps are measured alike.
        prompt: of the call; `None` where the call brings embeddings or needs none.
        ratio: `top_k_ratio`, the share of key tiles that each query tile keeps; `None` takes that of `config`.
        config: block size, combine, selection and ratio; `None` takes what VSA is enabled with, or else
            `VSAConfig(top_k_ratio=0.2)`.
        layers: positions of the video self-attention modules to measure, as `dense_layers` counts; `None` means all.
        steps: which denoising steps to measure, from 0, negative ones from the end; or how many, spread evenly.
        query: token `(t, h, w)` of the grid of which all kept tiles are recorded; `None` takes the one in the middle.
        query_tiles: how many query tiles are measured, the same of every layer and step; more take longer.
        seed: of the initial noise, and of the choice of query tiles.
        on_observation: called after every call that was measured.
        call: other arguments of the pipeline's call, such as `height`, `num_frames` and `num_inference_steps`.

    Returns:
        What was measured, with the frames of the dense video where the pipeline returns them.

    Raises:
        TypeError: `pipe` is no pipeline.
        ValueError: an argument is wrong, the pipeline is compiled or spread over ranks, or no call could be sparse.
    """
    if isinstance(pipe, torch.nn.Module) or not callable(pipe):
        raise TypeError(
            f"pipe={type(pipe).__name__} is no pipeline to call; pass one, or use observed_attention(transformer)."
        )
    with observed_attention(
        pipe, ratio, config=config, layers=layers, steps=steps, query=query, query_tiles=query_tiles, seed=seed,
        on_observation=on_observation,
    ) as inspection:  # fmt: skip
        given = {"generator": torch.Generator("cpu").manual_seed(seed)} | call
        if prompt is not None or "prompt" in inspect.signature(type(pipe).__call__).parameters:
            given["prompt"] = prompt
        output = pipe(**given)
        inspection.frames = None if call.get("output_type") == "latent" else _frames(output)
    inspection.prompt = prompt if isinstance(prompt, str) else None
    facts = {name: value for name, value in call.items() if isinstance(value, (int, float, str))}
    inspection.call = {name: value for name, value in facts.items() if name != "output_type"}
    inspection.call["seed"] = seed
    if not inspection.observations:
        raise ValueError(
            "no call of video self-attention could be sparse, so there is nothing to inspect; the log says why."
        )
    return inspection


@contextlib.contextmanager
def observed_attention(
    pipe: Any,
    ratio: float | None = None,
    *,
    config: VSAConfig | None = None,
    layers: Sequence[int] | None = None,
    steps: int | Sequence[int] = DEFAULT_STEPS,
    query: Sequence[int] | None = None,
    query_tiles: int = DEFAULT_QUERY_TILES,
    seed: int = 0,
    on_observation: Callable[[Observation], None] | None = None,
) -> Iterator[Inspection]:
    """Measure every forward in the block; afterwards the pipeline or transformer is as it was.

    Where no denoising loop calls the transformer, all forwards count as runs of step 0.

    Args:
        pipe: a pipeline or a transformer. The others are those of `inspect_attention`.

    Yields:
        The inspection, which fills up.

    Raises:
        ValueError, TypeError: as `inspect_attention`.
    """
    parts = supported_parts(pipe)
    _refuse_compiled(pipe, parts)
    chosen = _config(parts, ratio, config)
    sample = _Sample(_steps(steps), _token(query), _count("query_tiles", query_tiles), seed)
    inspection = Inspection([], chosen, sample.tiles, sample.query, type(pipe).__name__)

    def keep(observation: Observation) -> None:
        inspection.observations.append(observation)
        if on_observation is not None:
            on_observation(observation)

    with vsa_unchanged(list(parts.values())):
        for part, transformer in parts.items():
            processors = install_vsa(transformer, chosen, part)
            wanted = _positions(layers, len(processors), part)
            for position, (name, processor) in enumerate(processors.items()):
                if processor.exchange is not None:
                    raise ValueError(
                        f"{part} is spread over several ranks, each with a part of the heads; inspect it on one GPU."
                    )
                measured = sample if position in wanted else None
                processor.operation = _Observer(Layer(part, name, position), processor, measured, keep)
        yield inspection


@dataclass(frozen=True)
class _Sample:
    """What is measured: steps, a query token (`None`: the middle), and how many query tiles, drawn with this seed."""

    steps: int | tuple[int, ...]
    query: tuple[int, int, int] | None
    tiles: int
    seed: int

    def has_step(self, step: int, total: int) -> bool:
        if isinstance(self.steps, int):
            return step in spread_steps(self.steps, total)
        for asked in self.steps:
            if not -total <= asked < total:
                raise ValueError(f"steps={list(self.steps)}: the run has {total} steps, 0 to {total - 1}.")
        return step in {asked % total for asked in self.steps}

    def tile(self, grid: TileGrid) -> int:
        """The tile of the query token."""
        token = self.query or tuple(extent // 2 for extent in grid.video_shape)
        if any(position >= extent for position, extent in zip(token, grid.video_shape, strict=True)):
            raise ValueError(
                f"query={token} is not on the video's grid of {grid.video_shape} tokens; each of (t, h, w) counts from "
                "0 to below it."
            )
        return tile_of(token, grid)


class _Observer:
    """Stands in for the operation in one module: measures the calls it is asked to, and returns the dense result."""

    def __init__(
        self,
        layer: Layer,
        processor: FamilyAttnProcessor,
        sample: _Sample | None,
        keep: Callable[[Observation], None],
    ):
        self.layer = layer
        self.processor = processor
        self.sample = sample
        self.keep = keep
        self.step = -1
        self.run = 0

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        video_shape: tuple[int, int, int],
        *,
        block_size: tuple[int, int, int] | str,
        gate: torch.Tensor | None,
        combine: str,
        context_tokens: tuple[int, int],
        context_mask: torch.Tensor | None,
        selection: str,
        implementation: str,
        top_k: int | None = None,
        top_k_ratio: float = 0.5,
    ) -> torch.Tensor:
        block, kept = settle(video_shape, block_size, top_k_ratio, top_k)
        grid, scale = TileGrid(video_shape, block), query.shape[-1] ** -0.5
        problem = Problem(grid, kept, combine, scale, *context_tokens, selection)
        gate = gate if gate is None else gate.to(query.dtype)
        call = query, key, value, gate, context_mask, problem, implementation
        dense = dense_output(*call)
        position = position_in_run()
        step, total = (0, 1) if position is None else (position.step, position.total)
        self.run, self.step = (self.run + 1 if step == self.step else 0), step
        if self.sample is not None and self.sample.has_step(step, total):
            is_video = grid.video_shape == self.processor.state.video_shape
            tile = self.sample.tile(grid) if is_video else None
            tiles = sampled_tiles(grid.num_tiles, self.sample.tiles, self.sample.seed, tile)
            self.keep(Observation(self.layer, step, self.run, **measure(*call, tiles, tile, dense)))
        return dense


def spread_steps(count: int, total: int) -> set[int]:
    """Numbers of `count` steps of a run of `total`, spread evenly from first to last; all if there are fewer."""
    count = min(count, total)
    return {round(each * (total - 1) / max(1, count - 1)) for each in range(count)}


def _config(parts: dict[str, torch.nn.Module], ratio: float | None, config: VSAConfig | None) -> VSAConfig:
    """What to enable: what was passed, or is enabled, or the default; at one ratio in every layer and step."""
    if config is None:
        try:
            enabled = enabled_config(next(iter(parts.values())))
        except ValueError:
            enabled = VSAConfig(top_k_ratio=DEFAULT_RATIO)
        if not isinstance(enabled, VSAConfig):
            raise ValueError("config=None, but VSA is enabled with a dict of patterns; pass config=VSAConfig(...).")
        config = enabled
    if not isinstance(config, VSAConfig):
        raise TypeError(f"config={config!r} must be a VSAConfig.")
    if isinstance(config.schedule, RatioSchedule) and ratio is None:
        raise ValueError(f"schedule={config.schedule!r} has a ratio for every step; pass the ratio to inspect.")
    config = replace(config, dense_steps=0, dense_layers=(), modules=None, schedule="constant")
    return config if ratio is None else replace(config, top_k=None, top_k_ratio=ratio)


def _refuse_compiled(pipe: Any, parts: dict[str, torch.nn.Module]) -> None:
    wrapped = [pipe, *getattr(pipe, "components", {}).values()]
    compiled = any(hasattr(each, "_orig_mod") for each in wrapped)
    inside = (module for transformer in parts.values() for module in transformer.modules())
    if compiled or any(getattr(module, "_compiled_call_impl", None) is not None for module in inside):
        raise ValueError(
            "pipe is compiled, and compiled code cannot be looked into while it runs; inspect the pipeline before "
            "torch.compile or compile_repeated_blocks, or load it again."
        )


def _steps(steps: int | Sequence[int]) -> int | tuple[int, ...]:
    if isinstance(steps, Sequence) and not isinstance(steps, str) and len(steps) and all(type(x) is int for x in steps):
        return tuple(steps)
    if type(steps) is int and steps > 0:
        return steps
    raise ValueError(f"steps={steps!r} must be step numbers such as [0, 5, -1], or how many to spread evenly.")


def _count(name: str, value: int) -> int:
    count = whole(value)
    if count is None or count < 1:
        raise ValueError(f"{name}={value!r} must be a whole number, at least 1.")
    return count


def _token(query: Sequence[int] | None) -> tuple[int, int, int] | None:
    if query is None:
        return None
    token = whole_numbers(query, 3, 0)
    if token is None:
        raise ValueError(f"query={query!r} must be a token (t, h, w) of the grid, for example (4, 8, 8).")
    t, h, w = token
    return t, h, w


def _positions(layers: Sequence[int] | None, count: int, part: str) -> set[int]:
    if layers is None:
        return set(range(count))
    for layer in layers:
        if not -count <= layer < count:
            raise ValueError(
                f"layers={list(layers)}: {part} has {count} video self-attention layers, 0 to {count - 1}."
            )
    return {layer % count for layer in layers}


def _frames(output: Any) -> np.ndarray:
    """The first video of a pipeline's output, `[frames, height, width, 3]` in uint8."""
    frames = output.get("frames", output.get("video")) if isinstance(output, Mapping) else output[0]
    is_batch = getattr(frames, "ndim", 4) == 5 or isinstance(frames[0], list) or getattr(frames[0], "ndim", 3) == 4
    return video_frames(frames[0] if is_batch else frames)
