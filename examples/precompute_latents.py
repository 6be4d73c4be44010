"""Encode a folder of captioned videos, so that training needs neither VAE nor text encoder.

    accelerate launch examples/precompute_latents.py --pretrained_model_name_or_path Wan-AI/Wan2.1-T2V-1.3B-Diffusers \\
        --data_dir videos --output_dir latents --height 480 --width 832 --num_frames 81 --fps 16

`--data_dir` holds videos, with captions in `metadata.jsonl` (`{"file_name": "a.mp4", "text": "..."}` a line), or in a
text file beside each video. Writes safetensors shards of latents and of everything else that the pipeline would feed
its transformer. Several processes share the work; shards that are there already stay.
"""

from __future__ import annotations

import inspect
import json
import random
from dataclasses import dataclass, field
from pathlib import Path

import diffusers
import torch
from accelerate import PartialState
from PIL import Image
from tqdm import tqdm
from transformers import HfArgumentParser
from vsa_training.conventions import (
    capture_inputs,
    check_conventions,
    encode,
    layout_of,
    scheduler_shift,
    to_layout,
)
from vsa_training.dataset import Description, Sample, write_shard
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


def main(options: Options) -> None:
    """Encode everything."""
    state = PartialState()
    pipe = diffusers.DiffusionPipeline.from_pretrained(
        options.pretrained_model_name_or_path, torch_dtype=DTYPES[options.dtype]
    )
    pipe.set_progress_bar_config(disable=True)
    if options.offload:
        pipe.enable_model_cpu_offload(device=state.device)
    else:
        pipe.to(state.device)
    clips = find_clips(Path(options.data_dir), options.num_frames, options.fps, options.clips_per_video)
    precompute(pipe, clips, options, state.process_index, state.num_processes)
    state.wait_for_everyone()
    state.print(f"{len(clips)} clips in {options.output_dir}.")


def precompute(
    pipe: diffusers.DiffusionPipeline, clips: list[Clip], options: Options, process: int = 0, processes: int = 1
) -> None:
    """Encode this process's share of the shards, after proving on one clip that the pipeline is understood."""
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    first = sample_of(pipe, clips[0], options, check=True)
    if process == 0:
        description_of(pipe, first, options).save(folder)
    starts = range(0, len(clips), options.samples_per_shard)[process::processes]
    for start in tqdm(starts, desc="Shards", disable=process > 0):
        path = folder / f"{start // options.samples_per_shard:06d}.safetensors"
        if not path.exists():
            chosen = clips[start : start + options.samples_per_shard]
            write_shard(path, [sample_of(pipe, clip, options) for clip in chosen])


def sample_of(pipe: diffusers.DiffusionPipeline, clip: Clip, options: Options, check: bool = False) -> Sample:
    """One clip encoded, with what the pipeline would feed its transformer for its caption."""
    video = read_clip(clip, options.num_frames, options.fps, options.height, options.width)
    dropped = random.Random(f"{options.seed}-{clip.path.name}-{clip.number}").random() < options.caption_dropout
    caption = "" if dropped else clip.caption
    call = call_of(pipe, options) | {"prompt": caption}
    if "image" in inspect.signature(pipe.__call__).parameters:
        pixels = ((video[0, :, 0].movedim(0, -1) + 1) * 127.5).round().byte()
        call["image"] = Image.fromarray(pixels.numpy())
    latents = encode(pipe, video)
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
        pipeline=type(pipe).__name__,
        transformer=type(transformer).__name__,
        channel_axis=axis,
        shift=scheduler_shift(pipe, tokens),
        height=options.height,
        width=options.width,
        num_frames=options.num_frames,
        fps=options.fps,
        call=json.loads(options.pipeline_arguments),
    )


if __name__ == "__main__":
    main(*HfArgumentParser(Options, description=__doc__.splitlines()[0]).parse_args_into_dataclasses())
