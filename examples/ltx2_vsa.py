"""Video and sound with LTX-2 and Video Sparse Attention.

    python examples/ltx2_vsa.py --checkpoint Lightricks/LTX-2 --prompt "A cat plays the piano" --output cat.mp4
    python examples/ltx2_vsa.py --checkpoint ltx-2-19b-dev.safetensors --text-encoder-path gemma-3-12b-it --compare

`--help` lists what can be chosen; the README beside this file says what the model needs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from video_scripts import options

from vsa_diffusers.cli.script import run_script

CONFIG = "Lightricks/LTX-2"
Block = Annotated[
    tuple[int, int, int],
    typer.Option(help="Tokens of a tile along time, height and width.", rich_help_panel=options.SPARSITY),
]
Shape = Annotated[
    tuple[int, int, int] | None,
    typer.Option(
        help="Token grid along time, height and width; read from the latents if not given, and otherwise checked.",
        rich_help_panel=options.SPARSITY,
    ),
]


def main(
    checkpoint: Annotated[
        str,
        typer.Option(help="LTX-2: a folder in diffusers' layout, a name on the Hugging Face Hub, or a single file."),
    ],
    text_encoder_path: Annotated[
        str | None, typer.Option(help="Folder or name of Gemma with its tokenizer, instead of the checkpoint's own.")
    ] = None,
    config: Annotated[
        str,
        typer.Option(
            help="With a single file: folder or name of the configs that it lacks, and of the text encoder, if there "
            "is no --text-encoder-path."
        ),
    ] = CONFIG,
    prompt: options.Prompt = "A serene mountain landscape with a flowing river, golden hour lighting",
    negative_prompt: options.NegativePrompt = "worst quality, inconsistent motion, blurry, jittery, distorted",
    height: options.Height = 512,
    width: options.Width = 768,
    num_frames: options.NumFrames = 121,
    frame_rate: options.FrameRate = 25.0,
    num_inference_steps: options.NumInferenceSteps = 30,
    guidance_scale: options.GuidanceScale = 4.0,
    seed: options.Seed = 42,
    batch_size: Annotated[
        int, typer.Option(help="Videos of the prompt, made together.", min=1, rich_help_panel=options.VIDEO)
    ] = 1,
    skip_audio: Annotated[
        bool, typer.Option("--skip-audio", help="Write no sound.", rich_help_panel=options.VIDEO)
    ] = False,
    output: options.Output = Path("output_vsa.mp4"),
    output_baseline: Annotated[
        Path | None,
        typer.Option(help="File of the dense video; beside --output if not given.", rich_help_panel=options.VIDEO),
    ] = None,
    top_k_ratio: options.Ratio = 0.5,
    block_size: Block = (4, 4, 4),
    video_shape: Shape = None,
    dense_steps: options.DenseSteps = 0.0,
    dense_layers: options.DenseLayers = [],  # noqa: B006
    no_vsa: Annotated[
        bool, typer.Option("--no-vsa", help="Make the dense video only.", rich_help_panel=options.SPARSITY)
    ] = False,
    compare: options.Compare = False,
    compile_blocks: options.Compile = False,
    offload: options.Offload = "none",
    device: options.Device = "cuda",
    dtype: options.Dtype = "bfloat16",
) -> None:
    """Make a video with sound by LTX-2, its video self-attention sparse.

    Small videos gain little: 512x768 with 121 frames are 6 144 tokens, where attention is a small share of the time.
    At 1088x1920 there are 32 640. With --offload model, one part of the pipeline at a time is on the GPU.
    """
    from video_scripts.ltx2_files import load_ltx2
    from video_scripts.making import beside, check_machine, make_videos

    from vsa_diffusers import VSAConfig, enable_vsa
    from vsa_diffusers.generation.loading import place

    if no_vsa and compare:
        raise ValueError("--no-vsa makes the dense video only, and --compare both; leave one out.")
    sparse = VSAConfig(
        top_k_ratio, block_size=block_size, video_shape=video_shape, dense_steps=dense_steps,
        dense_layers=tuple(dense_layers),
    )  # fmt: skip
    check_machine(device, output)
    pipe = load_ltx2(checkpoint, text_encoder=text_encoder_path, config=config, dtype=dtype)
    place(pipe, device, offload)
    arguments = {
        "prompt": prompt, "negative_prompt": negative_prompt, "height": height, "width": width,
        "num_frames": num_frames, "frame_rate": frame_rate, "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale, "num_videos_per_prompt": batch_size,
    }  # fmt: skip
    make_videos(
        pipe,
        None if no_vsa else lambda: enable_vsa(pipe, config=sparse),
        arguments,
        seed=seed,
        output=output,
        fps=frame_rate,
        dense_output=(output_baseline or beside(output, "dense")) if compare else None,
        compiled=compile_blocks,
        sample_rate=None if skip_audio else pipe.vocoder.config.output_sampling_rate,
    )


if __name__ == "__main__":
    run_script(main)
