"""Encode a folder of captioned videos, so that training needs neither VAE nor text encoder.

    accelerate launch examples/training/precompute_latents.py \\
        --pretrained_model_name_or_path Wan-AI/Wan2.1-T2V-1.3B-Diffusers --data_dir videos \\
        --output_dir latents --height 480 --width 832 --num_frames 81 --fps 16

`--data_dir` holds videos, with captions in `metadata.jsonl` (`{"file_name": "a.mp4", "text": "..."}` a line), or in a
text file beside each video. Writes safetensors shards of latents and of everything else that the pipeline would feed
its transformer. Several processes share the work. The same command goes on where it stopped: shards that are there
stay, and those that were made otherwise, or are damaged, are refused.
"""

from __future__ import annotations

import inspect
import json
import math
import random
from dataclasses import dataclass, field
from pathlib import Path

import diffusers
import torch
from accelerate import PartialState
from PIL import Image
from tqdm import tqdm
from vsa_training.command_line import check_pretrained, run_script
from vsa_training.conventions import (
    SizeUnits,
    capture_inputs,
    check_conventions,
    encode,
    layout_of,
    scheduler_shift,
    to_layout,
)
from vsa_training.dataset import Sample, check_shard, write_shard
from vsa_training.description import Description
from vsa_training.identity import config_digest, module_digest
from vsa_training.videos import Clip, find_clips, read_clip

from vsa_diffusers.models import require_family
from vsa_diffusers.pipeline import supported_parts

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass
class Options:
    """What `--help` shows."""

    pretrained_model_name_or_path: str = field(metadata={"help": "Pipeline: a directory or a repository on the Hub."})
    data_dir: str = field(metadata={"help": "Folder with videos and their captions."})
    output_dir: str = field(metadata={"help": "Folder for the shards."})
    height: int = field(default=480, metadata={"help": "Pixels; videos are scaled and cropped in the middle."})
    width: int = field(default=832, metadata={"help": "Pixels."})
    num_frames: int = field(default=81, metadata={"help": "Frames of a clip."})
    fps: float = field(default=16, metadata={"help": "Frames per second of the clips, whatever the videos have."})
    clips_per_video: int = field(default=1, metadata={"help": "At most so many clips in a row of one video."})
    samples_per_shard: int = field(default=32, metadata={"help": "Clips in a file."})
    caption_dropout: float = field(
        default=0.1, metadata={"help": "Share of the clips that get an empty caption, for classifier-free guidance."}
    )
    pipeline_arguments: str = field(
        default="{}", metadata={"help": "Further arguments of the pipeline, such as '{\"max_sequence_length\": 226}'."}
    )
    dtype: str = field(default="bf16", metadata={"help": "Of the pipeline.", "choices": list(DTYPES)})
    offload: bool = field(default=False, metadata={"help": "Keep on the GPU only the part that is running."})
    seed: int = field(default=0, metadata={"help": "Decides which captions are dropped."})

    def __post_init__(self) -> None:
        for name in ("height", "width", "num_frames", "clips_per_video", "samples_per_shard"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if not 0 < self.fps < math.inf:
            raise ValueError(f"fps={self.fps} must be a positive number.")
        if not 0 <= self.caption_dropout <= 1:
            raise ValueError(f"caption_dropout={self.caption_dropout} must be in 0 to 1.")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} is unknown; choose one of {', '.join(DTYPES)}.")
        try:
            arguments = json.loads(self.pipeline_arguments)
        except ValueError as error:
            raise ValueError(f"pipeline_arguments={self.pipeline_arguments!r} is not JSON ({error}).") from error
        if not isinstance(arguments, dict):
            raise ValueError(f"pipeline_arguments={self.pipeline_arguments!r} must be an object, in braces.")


def main(options: Options) -> None:
    """Encode everything."""
    state = PartialState()
    clips = find_clips(Path(options.data_dir), options.num_frames, options.fps, options.clips_per_video)
    check_pretrained(options.pretrained_model_name_or_path)
    pipe = diffusers.DiffusionPipeline.from_pretrained(
        options.pretrained_model_name_or_path, dtype=DTYPES[options.dtype]
    )
    pipe.set_progress_bar_config(disable=True)
    if options.offload:
        pipe.enable_model_cpu_offload(device=state.device)
    else:
        pipe.to(state.device)
    precompute(pipe, clips, options, state.process_index, state.num_processes)
    state.wait_for_everyone()
    state.print(f"{len(clips)} clips in {options.output_dir}.")


def precompute(
    pipe: diffusers.DiffusionPipeline, clips: list[Clip], options: Options, process: int = 0, processes: int = 1
) -> None:
    """Encode this process's share of the shards, after proving on one clip that the pipeline is understood.

    Raises:
        ValueError: the model cannot take the size, or the folder holds shards that are damaged or were made otherwise.
    """
    SizeUnits.of(pipe).check(pipe, options.height, options.width, options.num_frames)
    folder = Path(options.output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir={folder} is not a directory; choose another one.")
    folder.mkdir(parents=True, exist_ok=True)
    Description.check_same(folder, facts_of(pipe, options) | source_of(pipe, options))
    plan = shards_of(folder, clips, options)
    for path, chosen in plan.items():
        if path.exists():
            check_shard(path, *identities(chosen, options))
    others = sorted(set(folder.glob("*.safetensors")) - plan.keys())
    if others:
        raise ValueError(
            f"{others[0]} holds clips that data_dir does not have now; remove it, or choose another output_dir."
        )
    first = sample_of(pipe, clips[0], options, check=True)
    description = description_of(pipe, first, options)
    Description.check_same(folder, {"shift": description.shift})
    if process == 0:
        description.save(folder)
    mine = list(plan.items())[process::processes]
    for path, chosen in tqdm(mine, desc="Shards", disable=process > 0):
        if not path.exists():
            samples = [sample_of(pipe, clip, options) for clip in chosen]
            write_shard(path, samples, identities(chosen, options)[0])


def shards_of(folder: Path, clips: list[Clip], options: Options) -> dict[Path, list[Clip]]:
    """The clips of every shard."""
    count = options.samples_per_shard
    return {
        folder / f"{start // count:06d}.safetensors": clips[start : start + count]
        for start in range(0, len(clips), count)
    }


def identities(clips: list[Clip], options: Options) -> tuple[list[str], list[str]]:
    """Names of clips, and the captions that they get."""
    names = [f"{clip.path.relative_to(options.data_dir).as_posix()}#{clip.number}" for clip in clips]
    return names, [caption_of(clip, options) for clip in clips]


def caption_of(clip: Clip, options: Options) -> str:
    """The clip's caption, or none, as the seed and the clip decide."""
    dropped = random.Random(f"{options.seed}-{clip.path.name}-{clip.number}").random() < options.caption_dropout
    return "" if dropped else clip.caption


def sample_of(pipe: diffusers.DiffusionPipeline, clip: Clip, options: Options, check: bool = False) -> Sample:
    """One clip encoded, with what the pipeline would feed its transformer for its caption."""
    video = read_clip(clip, options.num_frames, options.fps, options.height, options.width)
    caption = caption_of(clip, options)
    call = call_of(pipe, options) | {"prompt": caption}
    if "image" in inspect.signature(pipe.__call__).parameters:
        pixels = ((video[0, :, 0].movedim(0, -1) + 1) * 127.5).round().byte()
        call["image"] = Image.fromarray(pixels.numpy())
    latents = encode(pipe, video)
    if not latents.isfinite().all():
        raise ValueError(f"{clip.path} gives latents that are not finite with dtype={options.dtype}; try --dtype fp32.")
    clean = to_layout(pipe, latents)
    inputs = capture_inputs(pipe, call, clean)
    if check:
        check_conventions(pipe, call, latents, inputs)
    sample = Sample(clean.half(), inputs.timestep_scale, inputs.extra_channels, inputs.conditions, caption)
    return sample.to(torch.device("cpu"))


def call_of(pipe: diffusers.DiffusionPipeline, options: Options) -> dict:
    """Arguments of the pipeline's call, but for the prompt."""
    sizes = {"height": options.height, "width": options.width, "num_frames": options.num_frames}
    parameters = inspect.signature(pipe.__call__).parameters
    return {name: size for name, size in sizes.items() if name in parameters} | json.loads(options.pipeline_arguments)


def description_of(pipe: diffusers.DiffusionPipeline, sample: Sample, options: Options) -> Description:
    """What training has to know of the shards."""
    transformer = next(iter(supported_parts(pipe).values()))
    family = require_family(transformer)
    axis = layout_of(transformer).channel_axis
    hidden = sample.with_extra_channels(sample.clean, axis)
    grid = family.read_grid(transformer, sample.conditions | {"hidden_states": hidden})
    tokens = grid[0] * grid[1] * grid[2] if grid else 0
    return Description(
        channel_axis=axis,
        shift=scheduler_shift(pipe, tokens),
        source=source_of(pipe, options),
        **facts_of(pipe, options),
    )


def facts_of(pipe: diffusers.DiffusionPipeline, options: Options) -> dict:
    """Those fields of the description that are known before anything is encoded."""
    sizes = {name: getattr(options, name) for name in ("height", "width", "num_frames", "fps")}
    transformer = next(iter(supported_parts(pipe).values()))
    names = {"pipeline": type(pipe).__name__, "transformer": type(transformer).__name__}
    return names | sizes | {"call": json.loads(options.pipeline_arguments)}


def source_of(pipe: diffusers.DiffusionPipeline, options: Options) -> dict:
    """What decides the shards' content besides the sizes."""
    transformers = supported_parts(pipe)
    models = {
        name: config_digest(part) if name in transformers else module_digest(part)
        for name, part in pipe.components.items()
        if isinstance(part, torch.nn.Module)
    }
    names = ("samples_per_shard", "clips_per_video", "caption_dropout", "dtype", "seed")
    return models | {name: getattr(options, name) for name in names}


if __name__ == "__main__":
    run_script(Options, main, __doc__.splitlines()[0])
