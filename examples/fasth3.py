"""Video with sound in four or eight forwards with FastH3, students of MiniMax-H3 trained with Video Sparse Attention.

    python examples/fasth3.py --prompt "Rain on a tin roof, a dog barks" --output rain.mp4
    python examples/fasth3.py --model MiniMaxAI/MiniMax-H3 --forwards 4 --variant vsa-datafree \
        --checkpoint FastVideo/FastVideo-FastH3-4-step-Preview-v1-LoRA

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
        str, typer.Option(help="Weights and gates, or an adapter: a folder, or a repository on the Hugging Face Hub.")
    ] = "FastVideo/FastVideo-FastH3-8-Step-V2",
    model: Annotated[
        str | None, typer.Option(help="The pipeline that an adapter is for; the checkpoint's own if left out.")
    ] = None,
    variant: Annotated[str | None, typer.Option(help="Which of a repository's adapters.")] = None,
    forwards: Annotated[
        int, typer.Option(help="What the student was trained for: 4 or 8.", rich_help_panel=options.VIDEO)
    ] = 8,
    prompt: options.Prompt = "Rain on a tin roof, a dog barks in the distance",
    height: options.Height = 768,
    width: options.Width = 1344,
    num_frames: options.NumFrames = 124,
    seed: options.Seed = 0,
    output: options.Output = Path("fasth3.mp4"),
    device: options.Device = "cuda",
    dtype: options.Dtype = "bfloat16",
) -> None:
    """Make a video with sound by FastH3: no guidance, noise levels, gates and ratio as trained.

    Only text to video and audio was distilled.
    """
    import torch
    from diffusers import ModularPipeline
    from rich.console import Console
    from video_scripts.ladders import FASTH3, ladder_schedulers
    from video_scripts.making import check_machine

    from vsa_diffusers import load_vsa
    from vsa_diffusers.attention import check_choice
    from vsa_diffusers.generation.loading import DTYPES
    from vsa_diffusers.video_files import write_video

    check_machine(device, output)
    check_choice("dtype", dtype, tuple(DTYPES))
    schedulers = ladder_schedulers(forwards)
    pipe = ModularPipeline.from_pretrained(model or checkpoint, workflow="t2va")
    pipe.load_components(dtype=DTYPES[dtype])
    load_vsa(pipe.transformer, checkpoint, variant=variant)
    pipe.update_components(**schedulers)
    pipe.to(device)
    made = pipe(
        prompt=prompt, height=height, width=width, num_frames=num_frames, num_inference_steps=len(FASTH3[forwards][0]),
        generator=torch.Generator().manual_seed(seed), output_type="np",
    )  # fmt: skip
    write_video(output, made.get("videos")[0], 24, made.get("audio")[0], made.get("sampling_rate"))
    Console().print(f"{output}", highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    run_script(main)
