"""The models of `schedule_evidence.py`, each as the transformer alone with what its videos are made of."""

from __future__ import annotations

import json
import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from caption_detector import detect
from clips_wan import CLIPS, PATCH, Grid, prompts, read_description, read_held_out, windows
from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from procedural_video import sample_scene

from tiny_evidence import embed_captions
from tiny_wan_evaluation import held_out_captions
from tiny_wan_parts import LATENT_CHANNELS, decode_latents, normalise_latents
from tiny_wan_vae import encode_scenes


class EvidenceModel(ABC):
    """A model on a device, and how its videos begin and end.

    Args:
        transformer, scheduler: of diffusers.
        device: where everything is.
    """

    name: str
    usual_grid: Grid
    guidance = 1.0

    def __init__(self, transformer: WanTransformer3DModel, scheduler: Any, device: torch.device):
        self.transformer, self.scheduler, self.device = transformer.eval(), scheduler, device

    @property
    @abstractmethod
    def described(self) -> str:
        """One sentence on how much it was trained on."""

    @abstractmethod
    def latent_size(self, grid: Grid) -> tuple[int, int, int, int]:
        """Channels, frames, height and width of the transformer's input."""

    @abstractmethod
    def prompts(self, pairs: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Embeddings of the pairs' prompts, and of what guidance leads away from."""

    @abstractmethod
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Videos `[videos, 3, frames, height, width]` in [-1, 1]."""

    @abstractmethod
    def held_out(self, grid: Grid, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Clean latents that it was not trained on, and their embeddings."""

    def is_right(self, video: torch.Tensor, pair: int) -> bool | None:
        """Whether a video shows what the pair's prompt names; `None` where nothing can tell."""
        return None

    def noise(self, pairs: Sequence[int], grid: Grid) -> torch.Tensor:
        """Every pair's own, whatever the device and the batch, as a pipeline draws it from a generator of that seed."""
        size = (1, *self.latent_size(grid))
        drawn = [torch.randn(size, generator=torch.Generator().manual_seed(pair)) for pair in pairs]
        return torch.cat(drawn).to(self.device)


class TinyWanModel(EvidenceModel):
    """The tiny Wan model of this repository: held-out captions, with the guidance that suits it."""

    name = "tiny Wan"
    usual_grid = (16, 16, 16)
    described = "Trained on rendered clips of one moving shape each; nothing here is a real video."
    captions = 16

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device):
        self.pipe = WanPipeline.from_pretrained(folder, dtype=dtype).to(device)
        self.guidance = json.loads((folder / "recommended.json").read_text())["guidance_scale"]
        self.descriptions = held_out_captions(self.captions)
        super().__init__(self.pipe.transformer, self.pipe.scheduler, device)

    def latent_size(self, grid: Grid) -> tuple[int, int, int, int]:
        return (LATENT_CHANNELS, grid[0], 2 * grid[1], 2 * grid[2])

    def prompts(self, pairs: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor | None]:
        captions = [self.descriptions[pair % self.captions].caption for pair in pairs]
        return tuple(embed_captions(self.pipe, each, self.device) for each in (captions, [""] * len(captions)))

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return decode_latents(self.pipe.vae, latents).clamp(-1, 1)

    @torch.no_grad()
    def held_out(self, grid: Grid, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        if grid[1] != grid[2]:
            raise ValueError(f"grid={grid} is not square, as the rendered scenes are; choose T x N x N.")
        scenes = [sample_scene(seed, split="held_out") for seed in range(count)]
        vae = self.pipe.vae
        latents = encode_scenes(vae, scenes, 16 * grid[1], 4 * grid[0] - 3, self.device)
        return normalise_latents(vae, latents), embed_captions(
            self.pipe, [scene.caption for scene in scenes], self.device
        )

    def is_right(self, video: torch.Tensor, pair: int) -> bool | None:
        return all(detect(video).agrees(self.descriptions[pair % self.captions]).values())


class ClipsModel(EvidenceModel):
    """What `train_clips_wan.py` made."""

    name = "clips"
    usual_grid = (16, 32, 32)

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device):
        transformer = WanTransformer3DModel.from_pretrained(folder / "transformer", torch_dtype=dtype)
        scheduler = UniPCMultistepScheduler.from_pretrained(folder / "scheduler")
        self.clips = [frames.to(device) for frames in read_held_out(folder)]
        self.trained = read_description(folder)
        super().__init__(transformer.to(device), scheduler, device)

    @property
    def described(self) -> str:
        clips = self.trained["clips"]
        frames = sum(clip["frames_trained_on"] for clip in clips.values())
        return (
            f"Trained for {self.trained['training_steps']} steps on {frames} frames of {len(clips)} real clips and no "
            f"more ({', '.join(clips)}); held-out windows are of the last {len(self.clips[0])} frames of these clips."
        )

    def latent_size(self, grid: Grid) -> tuple[int, int, int, int]:
        return (3, grid[0], PATCH * grid[1], PATCH * grid[2])

    def prompts(self, pairs: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor | None]:
        return prompts([pair % len(self.clips) for pair in pairs]).to(self.device), None

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return latents.clamp(-1, 1)

    def held_out(self, grid: Grid, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        picks = [index % len(self.clips) for index in range(count)]
        return windows(self.clips, picks, grid, random.Random(0)), prompts(picks).to(self.device)


def load_evidence_model(folder: Path, device: torch.device) -> EvidenceModel:
    """The clips model where `folder` has one, else the tiny Wan pipeline; in bf16 unless on a CPU."""
    kind = ClipsModel if (folder / CLIPS).exists() else TinyWanModel
    return kind(folder, torch.float32 if device.type == "cpu" else torch.bfloat16, device)
