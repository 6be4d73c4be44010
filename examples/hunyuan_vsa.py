"""Video with HunyuanVideo and Video Sparse Attention.

    python examples/hunyuan_vsa.py --prompt "A cat walks on the grass, realistic" --output cat.mp4 --offload model
    python examples/hunyuan_vsa.py --height 544 --width 960 --num-frames 61 --compare

`--help` lists what can be chosen; the README beside this file says what the model needs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from video_scripts import options

from vsa_diffusers.cli.script import run_script


def main(
    model: options.Model = "hunyuanvideo-community/HunyuanVideo",
    prompt: options.Prompt = "A cat walks on the grass, realistic",
    height: options.Height = 720,
    width: options.Width = 1280,
    num_frames: options.NumFrames = 129,
    num_inference_steps: options.NumInferenceSteps = 50,
    guidance_scale: Annotated[
        float,
        typer.Option(
            help="How closely the prompt is followed; the model was distilled to take it as an input, so that a step "
            "is one forward.",
            rich_help_panel=options.VIDEO,
        ),
    ] = 6.0,
    seed: options.Seed = 0,
    output: options.Output = Path("hunyuan_vsa.mp4"),
    ratio: options.Ratio = 0.2,
    dense_steps: options.DenseSteps = 0.2,
    dense_layers: options.DenseLayers = [0],  # noqa: B006
    compare: options.Compare = False,
    compile_blocks: options.Compile = False,
    offload: options.Offload = "none",
    device: options.Device = "cuda",
    dtype: options.Dtype = "bfloat16",
) -> None:
    """Make a video by HunyuanVideo, its joint attention sparse between video tokens; text stays dense.

    129 frames of 720x1280 are 118 800 tokens: attention takes most of the time there. The first fifth of the steps and
    the first layer stay dense, which is where sparsity costs most. The VAE decodes in tiles, to save memory.
    """
    from video_scripts.making import beside, load, make_videos

    from vsa_diffusers import VSAConfig, enable_vsa

    sparse = VSAConfig(ratio, dense_steps=dense_steps, dense_layers=tuple(dense_layers))
    pipe = load(model, dtype=dtype, device=device, offload=offload, output=output)
    pipe.vae.enable_tiling()
    arguments = {
        "prompt": prompt, "height": height, "width": width, "num_frames": num_frames,
        "num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale,
    }  # fmt: skip
    make_videos(
        pipe,
        lambda: enable_vsa(pipe, config=sparse),
        arguments,
        seed=seed,
        output=output,
        fps=24,
        dense_output=beside(output, "dense") if compare else None,
        compiled=compile_blocks,
    )


if __name__ == "__main__":
    run_script(main)
