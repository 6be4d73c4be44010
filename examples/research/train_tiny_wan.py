"""Train, save and judge the tiny Wan model on procedural video.

    PYTHONPATH=examples/training python examples/research/train_tiny_wan.py all

Each stage (`vae`, `latents`, `transformer`, `evaluate`) goes on where its last call stopped. Checkpoints and latents go
to `--runs`, the finished pipeline to `--model`. Settings follow the hardware: see `tiny_wan_settings.py`.
"""

import json
import shutil
from pathlib import Path
from typing import Annotated

import torch
import typer
from diffusers import AutoencoderKLWan

from tiny_wan_evaluation import evaluate_pipeline, print_evaluation
from tiny_wan_parts import RECOMMENDED, save_pipeline
from tiny_wan_settings import Settings
from tiny_wan_transformer import encode_clips, train_transformer
from tiny_wan_vae import train_vae
from vsa_diffusers.cli.script import refusals
from vsa_diffusers.files import replaced_file

MODEL_FOLDER = Path(__file__).parents[1] / "tiny_wan"

Runs = Annotated[Path, typer.Option(help="Folder for checkpoints and latents.")]
Model = Annotated[Path, typer.Option(help="Folder for the finished pipeline.")]
Finished = Annotated[Path, typer.Option(help="Folder of the finished pipeline.", exists=True, file_okay=False)]
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto.")]
Minutes = Annotated[float | None, typer.Option(help="Training time of this stage, over all its calls.")]
CallMinutes = Annotated[float | None, typer.Option(help="End this call after so long, to be gone on with later.")]

app = typer.Typer(add_completion=False, help=__doc__.splitlines()[0])


@app.command()
def vae(
    runs: Runs = Path("runs"),
    device: Device = "auto",
    minutes: Minutes = None,
    call_minutes: CallMinutes = None,
) -> None:
    """Train the VAE."""
    settings = Settings.for_device(device)
    finished = train_vae(
        runs / "vae",
        settings.device,
        minutes=minutes or settings.vae_minutes,
        call_minutes=call_minutes,
        batch_size=settings.vae_batch_size,
        crop=settings.vae_crop,
        frames=settings.vae_frames,
        lr=settings.vae_lr,
    )
    if finished is None:
        raise typer.Exit(_unfinished("vae"))
    # Whole or not there; a missing one is made again from the checkpoint, at no cost.
    partial, final = runs / "vae" / "finished.partial", runs / "vae" / "finished"
    shutil.rmtree(partial, ignore_errors=True)
    finished.save_pretrained(partial)
    shutil.rmtree(final, ignore_errors=True)
    partial.replace(final)


@app.command()
def latents(runs: Runs = Path("runs"), device: Device = "auto") -> None:
    """Encode the clips that the transformer trains on."""
    settings = Settings.for_device(device)
    autoencoder = AutoencoderKLWan.from_pretrained(runs / "vae" / "finished")
    for clips in settings.clips:
        encode_clips(runs / "latents", autoencoder, clips, settings.device)


@app.command()
def transformer(
    runs: Runs = Path("runs"),
    model: Model = MODEL_FOLDER,
    device: Device = "auto",
    minutes: Minutes = None,
    call_minutes: CallMinutes = None,
) -> None:
    """Train transformer and text encoder, and save the whole pipeline."""
    settings = Settings.for_device(device)
    finished = train_transformer(
        runs / "transformer",
        runs / "latents",
        settings.phases,
        settings.device,
        minutes=minutes or settings.transformer_minutes,
        call_minutes=call_minutes,
        lr=settings.transformer_lr,
    )
    if finished is None:
        raise typer.Exit(_unfinished("transformer"))
    autoencoder = AutoencoderKLWan.from_pretrained(runs / "vae" / "finished")
    save_pipeline(model, autoencoder, finished)


@app.command()
def evaluate(
    model: Finished = MODEL_FOLDER,
    device: Device = "auto",
    captions: Annotated[int, typer.Option(help="Held-out captions to generate.")] = 50,
    vae_clips: Annotated[int, typer.Option(help="Held-out clips for the VAE's PSNR; 0 leaves it out.")] = 10,
    detector_clips: Annotated[
        int, typer.Option(help="Rendered clips that the detector is judged by; 0 leaves it out.")
    ] = 100,
    side: Annotated[int, typer.Option(help="Height and width of the generated videos.")] = RECOMMENDED["height"],
    frames: Annotated[int, typer.Option(help="Frames of the generated videos.")] = RECOMMENDED["num_frames"],
    steps: Annotated[int, typer.Option(help="Inference steps.")] = RECOMMENDED["num_inference_steps"],
    sheet: Annotated[Path | None, typer.Option(help="Also write a PNG with frames of every video.")] = None,
    top_k_ratio: Annotated[float | None, typer.Option(help="Judge it with VSA at this ratio.")] = None,
    vsa: Annotated[
        Path | None,
        typer.Option(help="Judge it with what save_vsa wrote into this folder.", exists=True, file_okay=False),
    ] = None,
    selection: Annotated[str | None, typer.Option(help="With VSA: score key tiles by mean or quarters.")] = None,
    dense_steps: Annotated[float | None, typer.Option(help="With VSA: share of the steps that stay dense.")] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Where the result goes; a whole evaluation of the dense model goes to its evaluation.json."),
    ] = None,
) -> None:
    """Generate held-out captions with the saved pipeline, dense or with VSA, and judge them."""
    settings = Settings.for_device(device)
    options = dict(top_k_ratio=top_k_ratio, selection=selection, dense_steps=dense_steps)
    options = {name: value for name, value in options.items() if value is not None}
    if options and top_k_ratio is None and vsa is None:
        given = ", ".join(f"{name}={value}" for name, value in options.items())
        raise typer.BadParameter(f"{given} needs VSA; add --top-k-ratio or --vsa.")
    if output is None and not options and vsa is None and vae_clips and detector_clips:
        output = model / "evaluation.json"
    result = evaluate_pipeline(
        model,
        settings.device,
        captions=captions,
        vae_clips=vae_clips,
        side=side,
        frames=frames,
        steps=steps,
        sheet=sheet,
        detector_clips=detector_clips,
        vsa=vsa,
        vsa_options=options,
    )
    print_evaluation(result)
    if output is None:
        typer.echo("Written to no file; --output names one.")
    else:
        output.parent.mkdir(parents=True, exist_ok=True)
        with replaced_file(output) as partial:
            partial.write_text(json.dumps(result, indent=2) + "\n")


@app.command(name="all")
def run_all(runs: Runs = Path("runs"), model: Model = MODEL_FOLDER, device: Device = "auto") -> None:
    """Every stage in turn; those that are finished cost nothing."""
    if not (runs / "vae" / "finished").exists():
        vae(runs, device, None, None)
    latents(runs, device)
    transformer(runs, model, device, None, None)
    evaluate(model, device)


def _unfinished(stage: str) -> int:
    """Exit status for a stage that stopped at `--call-minutes`: 75, "try again"."""
    typer.echo(f"Stopped in time; run `{stage}` again to go on.")
    return 75


if __name__ == "__main__":
    torch.set_float32_matmul_precision("high")
    with refusals():
        app()
