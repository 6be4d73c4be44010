"""One video by several GPUs: each has a part of the tokens, and attends sparsely with a part of the heads.

    torchrun --nproc-per-node 2 examples/multi_gpu.py --model Wan-AI/Wan2.1-T2V-14B-Diffusers --prompt "A cat." \
        --height 720 --width 1280 --num-frames 81 --ratio 0.2 --output cat.mp4
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from video_scripts import options

from vsa_diffusers.cli.output import tell
from vsa_diffusers.cli.script import run_script

TINY = Path(__file__).parent / "tiny_wan"


def main(
    model: options.Model = str(TINY),
    prompt: options.Prompt = "a red circle moves to the right",
    height: options.Height = 64,
    width: options.Width = 64,
    num_frames: options.NumFrames = 17,
    num_inference_steps: options.NumInferenceSteps = 20,
    guidance_scale: options.GuidanceScale = 3.0,
    seed: options.Seed = 0,
    fps: options.FrameRate = 16,
    output: options.Output = Path("multi_gpu.mp4"),
    ratio: options.Ratio = 0.3,
    guidance_parallel: Annotated[
        bool,
        typer.Option(
            "--guidance-parallel",
            help="Give each of two groups of GPUs one of guidance's two predictions.",
            rich_help_panel=options.MACHINE,
        ),
    ] = False,
    fsdp: Annotated[
        bool,
        typer.Option(
            "--fsdp",
            help="Shard the transformers' weights, for models that do not fit into one GPU.",
            rich_help_panel=options.MACHINE,
        ),
    ] = False,
    timeout: Annotated[
        float,
        typer.Option(help="Minutes after which a process that waits gives up.", rich_help_panel=options.MACHINE),
    ] = 5,
) -> None:
    """Make one video by several GPUs of this machine; start it with torchrun. Without --model, by a tiny model."""
    import torch.distributed as dist

    from vsa_diffusers.files import MissingDirectoryError
    from vsa_diffusers.generation.processes import joined_processes
    from vsa_diffusers.video_files import check_video_path

    if not Path(model).exists() and model.startswith((".", "/", "~")):
        raise MissingDirectoryError(f"{model}: no such directory; check the path.")
    check_video_path(output)
    if not dist.is_torchelastic_launched():
        raise ValueError("Several processes make the video; start them with torchrun --nproc-per-node 2.")
    call = {
        "prompt": prompt, "height": height, "width": width, "num_frames": num_frames,
        "num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale,
    }  # fmt: skip
    # What is refused here is told by every process; torchrun ends them together, with a status of its own.
    with joined_processes(timeout, tell) as device:
        pipe = load(model, device, fsdp)
        make_video(pipe, call, seed, ratio, guidance_parallel, output, fps)


def make_video(
    pipe: Any, call: dict[str, Any], seed: int, ratio: float, guidance_parallel: bool, output: Path, fps: float
) -> None:
    """Spread, denoise and write; the first process tells, and writes the file."""
    import torch
    import torch.distributed as dist

    from vsa_diffusers import enable_vsa, spread_over_gpus
    from vsa_diffusers.generation.processes import is_first
    from vsa_diffusers.video_files import write_video

    enable_vsa(pipe, ratio)
    spread_over_gpus(pipe, guidance_parallel=guidance_parallel)
    pipe.set_progress_bar_config(disable=not is_first())
    begin = time.perf_counter()
    # The same noise everywhere: every process steps through the whole video.
    frames = pipe(**call, generator=torch.Generator("cpu").manual_seed(seed), output_type="np").frames[0]
    if is_first():
        write_video(output, frames, fps)
        seconds = time.perf_counter() - begin
        print(f"{output}: {len(frames)} frames by {dist.get_world_size()} processes in {seconds:.1f} s")


def load(model: str, device: Any, fsdp: bool) -> Any:
    """The pipeline, whole on every process or with the weights of its transformers sharded."""
    import torch
    from diffusers import DiffusionPipeline

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    pipe = DiffusionPipeline.from_pretrained(model, dtype=dtype)
    for name, part in pipe.components.items():
        if not isinstance(part, torch.nn.Module):
            continue
        if fsdp and name.startswith("transformer"):
            shard(part)
        else:
            part.to(device)
    return pipe


def shard(transformer: Any) -> None:
    """Shard the weights block by block: one block at a time is whole on a GPU."""
    from torch.distributed.fsdp import fully_shard

    for module in list(transformer.modules()):
        if type(module).__name__ in (transformer._no_split_modules or ()):
            fully_shard(module)
    fully_shard(transformer)


if __name__ == "__main__":
    run_script(main)
