"""One video by several GPUs: each has a part of the tokens, and attends sparsely with a part of the heads.

    torchrun --nproc-per-node 2 examples/multi_gpu.py --model Wan-AI/Wan2.1-T2V-14B-Diffusers --prompt "A cat." \
        --height 720 --width 1280 --num-frames 81 --ratio 0.2 --output cat.mp4

`--guidance-parallel` gives each of two groups one of guidance's two predictions. `--fsdp` shards the weights of models
that do not fit into one GPU. Without `--model`, the tiny Wan model beside this file.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import DiffusionPipeline

from vsa_diffusers import enable_vsa, spread_over_gpus
from vsa_diffusers.generation.processes import is_first, joined_processes
from vsa_diffusers.video_files import write_video

TINY = Path(__file__).parent / "tiny_wan"


def main() -> None:
    """Make the video; the first process tells, and writes it."""
    args = parse_arguments()
    with joined_processes(args.timeout) as device:
        make_video(args, device)


def make_video(args: argparse.Namespace, device: torch.device) -> None:
    """Load, spread, denoise and write."""
    first = is_first()
    pipe = load(args, device)
    enable_vsa(pipe, args.ratio, block_size="auto")
    spread_over_gpus(pipe, guidance_parallel=args.guidance_parallel)
    pipe.set_progress_bar_config(disable=not first)
    begin = time.perf_counter()
    frames = pipe(
        prompt=args.prompt,
        height=args.height,
        width=args.width,
        num_frames=args.num_frames,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        # The same noise everywhere: every process steps through the whole video.
        generator=torch.Generator("cpu").manual_seed(args.seed),
    ).frames[0]
    if first:
        write_video(args.output, frames, args.fps)
        seconds = time.perf_counter() - begin
        print(f"{args.output}: {len(frames)} frames by {dist.get_world_size()} processes in {seconds:.1f} s")


def load(args: argparse.Namespace, device: torch.device) -> DiffusionPipeline:
    """The pipeline, whole on every process or with the weights of its transformers sharded."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    pipe = DiffusionPipeline.from_pretrained(args.model, torch_dtype=dtype)
    for name, part in pipe.components.items():
        if not isinstance(part, torch.nn.Module):
            continue
        if args.fsdp and name.startswith("transformer"):
            shard(part)
        else:
            part.to(device)
    return pipe


def shard(transformer: torch.nn.Module) -> None:
    """Shard the weights block by block: one block at a time is whole on a GPU."""
    for module in list(transformer.modules()):
        if type(module).__name__ in (transformer._no_split_modules or ()):
            torch.distributed.fsdp.fully_shard(module)
    torch.distributed.fsdp.fully_shard(transformer)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=TINY, help="name on the hub, or a directory")
    parser.add_argument("--prompt", default="a red circle moves to the right")
    parser.add_argument("--height", type=int, default=64)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--num-frames", type=int, default=17)
    parser.add_argument("--num-inference-steps", type=int, default=20)
    parser.add_argument("--guidance-scale", type=float, default=3.0)
    parser.add_argument("--ratio", type=float, default=0.3, help="top_k_ratio, the share of key tiles that are kept")
    parser.add_argument("--guidance-parallel", action="store_true", help="one of guidance's predictions per group")
    parser.add_argument("--fsdp", action="store_true", help="shard the transformers' weights")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fps", type=int, default=16)
    parser.add_argument("--timeout", type=float, default=5, help="minutes after which a process that waits gives up")
    parser.add_argument("--output", type=Path, default=Path("multi_gpu.mp4"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
