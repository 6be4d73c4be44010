"""Video with Wan 2.1 and Video Sparse Attention.

    python examples/wan_vsa.py --prompt "A cat walks on the grass, realistic" --output cat.mp4 --compare
    python examples/wan_vsa.py --model Wan-AI/Wan2.1-T2V-14B-Diffusers --height 720 --width 1280 --flow-shift 5

`--help` lists what can be chosen; the README beside this file says what the model needs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from video_scripts import options

from vsa_diffusers.cli.script import run_script

WRONG = (
    "Bright tones, overexposed, static, blurred details, subtitles, style, works, paintings, images, static, overall "
    "gray, worst quality, low quality, JPEG compression residue, ugly, incomplete, extra fingers, poorly drawn hands"
)


def main(
    model: options.Model = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    prompt: options.Prompt = "A cat walks on the grass, realistic",
    negative_prompt: options.NegativePrompt = WRONG,
    height: options.Height = 480,
    width: options.Width = 832,
    num_frames: options.NumFrames = 81,
    num_inference_steps: options.NumInferenceSteps = 50,
    guidance_scale: options.GuidanceScale = 5.0,
    flow_shift: Annotated[
        float, typer.Option(help="Of the noise levels: 3 for 480p, 5 for 720p.", rich_help_panel=options.VIDEO)
    ] = 3.0,
    seed: options.Seed = 0,
    output: options.Output = Path("wan_vsa.mp4"),
    ratio: options.Ratio = 0.2,
    dense_steps: options.DenseSteps = 0.2,
    dense_layers: options.DenseLayers = [0],  # noqa: B006
    compare: options.Compare = False,
    compile_blocks: options.Compile = False,
    offload: options.Offload = "none",
    device: options.Device = "cuda",
    dtype: options.Dtype = "bfloat16",
) -> None:
    """Make a video by Wan 2.1, its self-attention sparse.

    The model has 81 frames of 480x832 (1.3B) or 720x1280 (14B) in mind. The first fifth of the steps and the first
    layer stay dense, which is where sparsity costs most.
    """
    from diffusers import UniPCMultistepScheduler
    from video_scripts.making import beside, load, make_videos

    from vsa_diffusers import VSAConfig, enable_vsa

    sparse = VSAConfig(ratio, dense_steps=dense_steps, dense_layers=tuple(dense_layers))
    pipe = load(model, dtype=dtype, device=device, offload=offload, output=output, in_float32=["vae"])
    pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config, flow_shift=flow_shift)
    arguments = {
        "prompt": prompt, "negative_prompt": negative_prompt, "height": height, "width": width,
        "num_frames": num_frames, "num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale,
    }  # fmt: skip
    make_videos(
        pipe,
        lambda: enable_vsa(pipe, config=sparse),
        arguments,
        seed=seed,
        output=output,
        fps=16,
        dense_output=beside(output, "dense") if compare else None,
        compiled=compile_blocks,
    )


if __name__ == "__main__":
    run_script(main)
