"""Video with the two experts of Wan 2.2, each with its own share of kept tiles.

    python examples/wan22_two_experts.py --prompt "A cat walks on the grass, realistic" --offload model
    python examples/wan22_two_experts.py --high-noise-ratio 0.5 --low-noise-ratio 0.1 --compare

`--help` lists what can be chosen; the README beside this file says what the model needs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from video_scripts import options

from vsa_diffusers.cli.script import run_script


def main(
    model: options.Model = "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
    prompt: options.Prompt = "A cat walks on the grass, realistic",
    negative_prompt: options.NegativePrompt = "overexposed, static, blurred details, subtitles, worst quality",
    height: options.Height = 720,
    width: options.Width = 1280,
    num_frames: options.NumFrames = 81,
    num_inference_steps: options.NumInferenceSteps = 40,
    guidance_scale: options.GuidanceScale = 4.0,
    guidance_scale_2: Annotated[
        float, typer.Option(help="The same for the second expert.", rich_help_panel=options.VIDEO)
    ] = 3.0,
    seed: options.Seed = 0,
    output: options.Output = Path("wan22_vsa.mp4"),
    high_noise_ratio: Annotated[
        float,
        typer.Option(help="Share of the key tiles that the first expert keeps.", rich_help_panel=options.SPARSITY),
    ] = 0.4,
    low_noise_ratio: Annotated[
        float,
        typer.Option(help="Share of the key tiles that the second expert keeps.", rich_help_panel=options.SPARSITY),
    ] = 0.15,
    dense_steps: options.DenseSteps = 0.1,
    compare: options.Compare = False,
    compile_blocks: options.Compile = False,
    offload: options.Offload = "none",
    device: options.Device = "cuda",
    dtype: options.Dtype = "bfloat16",
) -> None:
    """Make a video by Wan 2.2, whose first expert settles what is seen, and whose second one draws the details.

    What goes wrong early changes the whole video, so the first expert keeps more tiles, and the first steps stay dense.
    Both ratios are advice, not measured with this model. Each expert has 14 billion parameters, 27 GiB in bfloat16.
    """
    from video_scripts.making import beside, load, make_videos

    from vsa_diffusers import VSAConfig, enable_vsa

    first = VSAConfig(high_noise_ratio, dense_steps=dense_steps)
    second = VSAConfig(low_noise_ratio)
    pipe = load(model, dtype=dtype, device=device, offload=offload, output=output, in_float32=["vae"])
    if getattr(pipe, "transformer_2", None) is None:
        raise ValueError(f"model={model!r} has one transformer; use wan_vsa.py for it.")

    def enable() -> None:
        enable_vsa(pipe.transformer, config=first)
        enable_vsa(pipe.transformer_2, config=second)

    arguments = {
        "prompt": prompt, "negative_prompt": negative_prompt, "height": height, "width": width,
        "num_frames": num_frames, "num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale,
        "guidance_scale_2": guidance_scale_2,
    }  # fmt: skip
    make_videos(
        pipe,
        enable,
        arguments,
        seed=seed,
        output=output,
        fps=16,
        dense_output=beside(output, "dense") if compare else None,
        compiled=compile_blocks,
    )


if __name__ == "__main__":
    run_script(main)
