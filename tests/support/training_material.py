"""Captioned clips, a tiny pipeline on disk, and options to train it with, for the tests of training."""

from pathlib import Path

import imageio.v3 as imageio
import precompute_latents
import torch
from diffusers import WanTransformer3DModel
from procedural_video import render, sample_scene
from vsa_training.dataset import Sample, write_shard
from vsa_training.description import Description
from vsa_training.options import Options
from vsa_training.videos import find_clips

from tiny_models import RECIPES

HEIGHT, WIDTH, FRAMES, FPS = 64, 96, 17, 16


def write_videos(folder: Path, count: int) -> None:
    """Larger than what is encoded, with captions beside them."""
    folder.mkdir()
    for seed in range(count):
        scene = sample_scene(seed)
        frames = ((render(scene, 80, 96, 20) + 1) * 127.5).round().byte().permute(1, 2, 3, 0).numpy()
        imageio.imwrite(folder / f"{seed}.mp4", frames, plugin="FFMPEG", fps=FPS)
        (folder / f"{seed}.txt").write_text(scene.caption + "\n")


def precompute_options(folder: Path, **changes) -> precompute_latents.Options:
    options = dict(
        pretrained_model_name_or_path=str(folder / "pipe"), data_dir=str(folder / "videos"),
        output_dir=str(folder / "latents"), height=HEIGHT, width=WIDTH, num_frames=FRAMES, fps=FPS,
        samples_per_shard=2, caption_dropout=0.0, pipeline_arguments='{"max_sequence_length": 32}', dtype="fp32",
    )  # fmt: skip
    return precompute_latents.Options(**options | changes)


def precompute(pipe, folder: Path, count: int | None = None, **changes) -> None:
    options = precompute_options(folder, **changes)
    clips = find_clips(folder / "videos", options.num_frames, options.fps, options.clips_per_video)
    precompute_latents.precompute(pipe, clips[:count], options)


def random_material(folder: Path, layers: int = 2, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """A tiny transformer, and shards of random latents for it, with text embeddings of this dtype."""
    config = dict(RECIPES[0].build().config) | {"num_layers": layers}
    WanTransformer3DModel.from_config(config).save_pretrained(folder / "pipe" / "transformer")
    (folder / "latents").mkdir()
    torch.manual_seed(seed)
    for shard in range(3):
        samples = [
            Sample(torch.randn(1, 4, 4, 8, 8).half(), torch.ones(1), None, {"encoder_hidden_states": text}, "a ring")
            for text in torch.randn(2, 1, 8, 16).to(dtype)
        ]
        write_shard(folder / "latents" / f"{shard:06d}.safetensors", samples)
    Description("WanPipeline", "WanTransformer3DModel", 1, 3.0, 64, 64, 13, 16).save(folder / "latents")
    return folder


def training_options(folder: Path, output: Path, **changes) -> Options:
    options = dict(
        pretrained_model_name_or_path=str(folder / "pipe"), data_dir=str(folder / "latents"), output_dir=str(output),
        block_size=[1, 2, 2], top_k_ratio=0.3, combine="gate", dense_layers=[], max_train_steps=6, train_batch_size=2,
        gradient_accumulation_steps=1, optimizer="adamw", learning_rate=1e-3, gate_learning_rate=1e-2,
        lr_scheduler="constant_with_warmup", lr_warmup_steps=2, ramp_steps=4, checkpointing_steps=4,
        validation_steps=3, validation_sigmas=2, dataloader_num_workers=0,
    )  # fmt: skip
    return Options(**options | changes)
