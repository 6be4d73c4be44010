"""Video in three steps with FastWan, which was trained with Video Sparse Attention.

    python examples/fastwan.py --prompt "A cat walks on the grass, realistic" --output cat.mp4
    python examples/fastwan.py --model Wan-AI/Wan2.1-T2V-14B-Diffusers \
        --checkpoint FastVideo/FastWan2.1-T2V-14B-Diffusers --offload model

`--help` lists what can be chosen; docs/checkpoints.md says what is known of each checkpoint.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from video_scripts import options

from vsa_diffusers.cli.script import run_script


def main(
    checkpoint: Annotated[
        str, typer.Option(help="Weights and gates: a folder, or a repository on the Hugging Face Hub.")
    ] = "FastVideo/FastWan2.1-T2V-1.3B-Diffusers",
    model: Annotated[
        str | None,
        typer.Option(help="The pipeline that they are loaded on, as the 14B needs; the checkpoint's own if left out."),
    ] = None,
    prompt: options.Prompt = "A cat walks on the grass, realistic",
    height: options.Height = 448,
    width: options.Width = 832,
    num_frames: options.NumFrames = 77,
    seed: options.Seed = 0,
    output: options.Output = Path("fastwan.mp4"),
    compile_blocks: options.Compile = False,
    offload: options.Offload = "none",
    device: options.Device = "cuda",
    dtype: options.Dtype = "bfloat16",
) -> None:
    """Make a video by FastWan: three steps, no guidance, fresh noise in each, gates and ratio as trained.

    It was trained at 77 frames of 448x832, where tiles divide the video evenly.
    """
    import torch
    from diffusers import AutoencoderKLWan, WanPipeline
    from video_scripts.ladders import FASTWAN, DMDScheduler
    from video_scripts.making import check_machine, make_videos

    from vsa_diffusers import load_vsa
    from vsa_diffusers.attention import check_choice
    from vsa_diffusers.generation.loading import DTYPES, place

    check_machine(device, output)
    check_choice("dtype", dtype, tuple(DTYPES))
    source = model or checkpoint
    # The index of FastVideo's names a class that diffusers lacks, so the class is given.
    vae = AutoencoderKLWan.from_pretrained(source, subfolder="vae", dtype=torch.float32)
    pipe = WanPipeline.from_pretrained(source, vae=vae, dtype=DTYPES[dtype])
    load_vsa(pipe, checkpoint)
    pipe.scheduler = DMDScheduler(seed=seed + 1)
    place(pipe, device, offload)
    arguments = {
        "prompt": prompt, "height": height, "width": width, "num_frames": num_frames,
        "num_inference_steps": len(FASTWAN), "guidance_scale": 1.0,
    }  # fmt: skip
    make_videos(pipe, lambda: None, arguments, seed=seed, output=output, fps=16, compiled=compile_blocks)


if __name__ == "__main__":
    run_script(main)
