"""One call of a pipeline: its arguments under the names that it knows, and what comes out as one kind of video."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline

from ..tiles import whole
from ..video_files import video_frames

# What the examples in diffusers' documentation write, by the beginning of the pipeline's name.
_FRAMES_PER_SECOND = {
    "Allegro": 15, "AnyFlow": 16, "ChronoEdit": 16, "CogVideoX": 8, "ConsisID": 8, "Cosmos2": 16, "Cosmos": 30,
    "EasyAnimate": 8, "Helios": 24, "HunyuanSkyreels": 15, "HunyuanVideo15": 24, "HunyuanVideoFramepack": 30,
    "HunyuanVideo": 15, "Kandinsky": 24, "LTX": 24, "Lucy": 24, "Mochi": 30, "MotifVideo": 24, "SkyReelsV2": 24,
    "WanAnimate": 30, "Wan": 16,
}  # fmt: skip
_USUAL_FRAMES_PER_SECOND = 16
_RATES = ("frame_rate", "fps")
_WELL_KNOWN = re.compile("image|video|prompt|frames|height|width|steps|guidance|max_sequence")


@dataclass(frozen=True)
class Video:
    """What one call made.

    Args:
        frames: `[frames, height, width, 3]`, uint8.
        fps: frames per second.
        audio: `[channels, samples]` in -1 to 1, where the pipeline makes sound.
        sample_rate: samples per second of it.
    """

    frames: np.ndarray
    fps: float
    audio: torch.Tensor | None = None
    sample_rate: int | None = None


def call_arguments(pipe: DiffusionPipeline | type, **wanted: Any) -> dict[str, Any]:
    """The arguments of `pipe(...)`: those of `wanted` that are not `None`.

    Args:
        pipe: the pipeline, or its class.
        wanted: by their names in diffusers, such as `num_frames`; an `image` may be a file. `fps` becomes what the
            pipeline calls it, and is left out where it has no such argument, since it then counts for the file only.

    Raises:
        ValueError: one that the call does not know, no denoising steps, or an image that it needs and that is missing.
        OSError: the image cannot be read.
    """
    cls = pipe if isinstance(pipe, type) else type(pipe)
    parameters = inspect.signature(cls.__call__).parameters
    known = [name for name in parameters if name != "self"]
    given = {name: value for name, value in wanted.items() if value is not None}
    fps = given.pop("fps", None)
    for name in given:
        if name not in known:
            raise ValueError(
                f"{name}: {cls.__name__} takes no such argument; leave it out. It takes "
                f"{', '.join(each for each in known if _WELL_KNOWN.search(each))}."
            )
    steps = given.get("num_inference_steps")
    if steps is not None and (whole(steps) or 0) < 1:
        raise ValueError(f"num_inference_steps={steps!r} must be a whole number of denoising steps, at least 1.")
    image = parameters.get("image")
    if image is not None and image.default is inspect.Parameter.empty and "image" not in given:
        raise ValueError(f"image: {cls.__name__} makes videos from an image; pass one.")
    if isinstance(given.get("image"), (str, Path)):
        from PIL import Image

        with Image.open(given["image"]) as opened:
            given["image"] = opened.convert("RGB")
    rate = next((name for name in _RATES if name in known), None)
    return given | ({rate: fps} if rate is not None and fps is not None else {})


def calls_by_prompt(
    pipe: DiffusionPipeline | type, prompts: Sequence[str], arguments: Mapping[str, Any], fps: float | None = None
) -> list[dict[str, Any]]:
    """The arguments of a call for each prompt; errors are those of `call_arguments`, and of a prompt among them."""
    if "prompt" in arguments:
        raise ValueError(f"arguments has prompt={arguments['prompt']!r}; pass it among prompts={list(prompts)}.")
    return [call_arguments(pipe, **arguments, prompt=prompt, fps=fps) for prompt in prompts]


def frames_per_second(pipe: DiffusionPipeline, arguments: Mapping[str, Any]) -> float:
    """At what rate a call's frames are meant to be seen: as told, or by the pipeline's default or kind."""
    parameters = inspect.signature(type(pipe).__call__).parameters
    for name in _RATES:
        default = parameters[name].default if name in parameters else None
        rate = arguments.get(name, default)
        if isinstance(rate, (int, float)):
            return float(rate)
    name = type(pipe).__name__
    return next(
        (rate for start, rate in _FRAMES_PER_SECOND.items() if name.startswith(start)), _USUAL_FRAMES_PER_SECOND
    )


def call_pipeline(
    pipe: DiffusionPipeline,
    arguments: Mapping[str, Any],
    seed: int,
    *,
    fps: float | None = None,
    on_step: Callable[[], None] | None = None,
) -> Video:
    """Call the pipeline for one video, and check that it is one.

    Args:
        pipe: the pipeline.
        arguments: as `call_arguments` returns them.
        seed: of the noise, which is drawn on the CPU, so that it is the same on every device.
        fps: frames per second; `None` takes those of `frames_per_second`.
        on_step: called after each denoising step, where the pipeline tells of them.

    Raises:
        ValueError: the frames hold NaN or infinity, or values beyond their range, or are images.
    """
    output = run_pipeline(pipe, arguments, seed, on_step=on_step, output_type="np")
    frames = output.get("frames", output.get("video"))
    if frames is None:
        raise ValueError(f"{type(pipe).__name__} made {', '.join(output)} instead of a video; use a video pipeline.")
    if getattr(frames, "ndim", 0) == 5 or isinstance(frames[0], list) or getattr(frames[0], "ndim", 0) == 4:
        frames = frames[0]  # of a batch of one
    audio, sample_rate = _sound(pipe, output)
    rate = frames_per_second(pipe, arguments) if fps is None else fps
    return Video(video_frames(frames), float(rate), audio, sample_rate)


def run_pipeline(
    pipe: DiffusionPipeline,
    arguments: Mapping[str, Any],
    seed: int,
    *,
    on_step: Callable[[], None] | None = None,
    output_type: str = "np",
) -> Mapping[str, Any]:
    """Call the pipeline; its output by name. Arguments are as those of `call_pipeline`."""

    def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if on_step is not None:
            on_step()
        return tensors

    parameters = inspect.signature(type(pipe).__call__).parameters
    more: dict[str, Any] = {"output_type": output_type, "generator": torch.Generator("cpu").manual_seed(seed)}
    if on_step is not None and "callback_on_step_end" in parameters:
        more["callback_on_step_end"] = callback
    return pipe(**{**arguments, **{name: value for name, value in more.items() if name in parameters}})


def tells_steps(pipe: DiffusionPipeline) -> bool:
    """Whether the pipeline tells of its denoising steps."""
    return "callback_on_step_end" in inspect.signature(type(pipe).__call__).parameters


def number_of_steps(pipe: DiffusionPipeline, arguments: Mapping[str, Any]) -> int | None:
    """Denoising steps of a call; `None` where the pipeline has no argument for them."""
    parameter = inspect.signature(type(pipe).__call__).parameters.get("num_inference_steps")
    steps = arguments.get("num_inference_steps", None if parameter is None else parameter.default)
    return steps if isinstance(steps, int) else None


def named_arguments(texts: list[str]) -> dict[str, Any]:
    """`["max_sequence_length=32"]` as a dict; values are read as JSON where they are JSON, else as text.

    Raises:
        ValueError: one is not of the form NAME=VALUE.
    """
    values = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.strip().isidentifier():
            raise ValueError(f"{text!r} is not of the form NAME=VALUE, for example max_sequence_length=32.")
        try:
            values[name.strip()] = json.loads(value)
        except ValueError:
            values[name.strip()] = value
    return values


def _sound(pipe: DiffusionPipeline, output: Mapping[str, Any]) -> tuple[torch.Tensor | None, int | None]:
    """The first sound `[channels, samples]` of a batch and its rate, each family keeping them elsewhere."""
    audio = output.get("audio", output.get("sound"))
    if audio is None:
        return None, None
    sound = torch.as_tensor(audio).detach().float().cpu()
    rates = (
        (getattr(pipe, "vocoder", None), "output_sampling_rate"),
        (getattr(pipe, "sound_tokenizer", None), "sampling_rate"),
        (getattr(pipe, "audio_vae", None), "sample_rate"),
    )
    rate = next(
        (part.config[name] for part, name in rates if part is not None and name in part.config),
        getattr(pipe, "audio_sample_rate", None),
    )
    if rate is None:
        raise ValueError(f"{type(pipe).__name__} made sound, but its sample rate is not known.")
    # LTX-2: [batch, channels, samples]; Kandinsky 6: [batch, samples]; Cosmos 3: [channels, samples].
    is_batch = sound.ndim == 3 or (sound.ndim == 2 and "audio" in output)
    return torch.atleast_2d(sound[0] if is_batch else sound), int(rate)
