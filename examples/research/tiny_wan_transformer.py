"""The tiny transformer and text encoder: latents made once, then flow matching from few tokens to the full grid."""

import copy
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from procedural_video import sample_scene
from rich.console import Console
from rich.progress import track
from safetensors.torch import save_file
from torch import nn
from vsa_training.identity import module_digest

from tiny_wan_parts import TinyWan, normalise_latents
from tiny_wan_training import TrainingRun, autocast, progress_bar
from tiny_wan_vae import encode_scenes, without_past
from vsa_diffusers.files import opened_tensors, read_tensors, replaced_file

SHARD = 32
CAPTION_DROPOUT = 0.1
# Callers pad the caption to a length of their choice, 512 unless they say otherwise, and padding is attended to.
PADDED_LENGTHS = (16, 24, 32, 32, 64, 128, 226, 512)


@dataclass(frozen=True)
class Clips:
    """A set of encoded clips of one size."""

    side: int
    frames: int
    count: int

    @property
    def name(self) -> str:
        return f"{self.side}x{self.frames}"

    def scene(self, index: int):
        """No scene occurs at two sizes."""
        return sample_scene(1_000_000 * self.side + 10_000_000_000 * self.frames + index)


@dataclass(frozen=True)
class Phase:
    """A stretch of the training: which clips, and what of them, until the share `until` of the time is spent."""

    until: float
    clips: Clips
    batch_size: int
    shift: float
    latent_frames: int | None = None


def encode_clips(folder: Path, vae: AutoencoderKLWan, clips: Clips, device: torch.device) -> None:
    """Write normalised latents of every clip, in shards; those already there stay.

    Raises:
        ValueError: a shard is damaged, or of another VAE.
    """
    (folder / clips.name).mkdir(parents=True, exist_ok=True)
    made_with = {"vae": module_digest(vae)}
    # Not an approximation: the slices that this leaves out are zero.
    vae = without_past(copy.deepcopy(vae)).to(device)
    # On stderr: what scripts print may be data.
    places = track(range(0, clips.count, SHARD), description=f"Latents {clips.name}", console=Console(stderr=True))
    for first in places:
        shard = folder / clips.name / f"{first:06d}.safetensors"
        if shard.exists():
            with opened_tensors(shard) as file:
                there = file.metadata() or made_with
            if there != made_with:
                raise ValueError(f"{shard} was made with another VAE; remove it, or choose another folder.")
        else:
            scenes = [clips.scene(index) for index in range(first, first + SHARD)]
            latents = encode_scenes(vae, scenes, clips.side, clips.frames, device)
            with replaced_file(shard) as partial:
                save_file({"latents": normalise_latents(vae, latents).half().cpu()}, partial, metadata=made_with)


def load_clips(folder: Path, clips: Clips, device: torch.device) -> tuple[torch.Tensor, list[str]]:
    """Latents `[clips, channels, frames, height, width]` in fp16 and their captions."""
    shards = sorted((folder / clips.name).glob("*.safetensors"))
    latents = torch.cat([read_tensors(shard)["latents"] for shard in shards]).to(device)
    return latents, [clips.scene(index).caption for index in range(len(latents))]


class SelectedFrames(nn.Module):
    """Wan's rotary embedding for some latent frames of a longer clip, each at its own place in time.

    A step on a quarter of the frames costs about a ninth of one on all of them and still sees frames of full size.
    """

    def __init__(self, rope: nn.Module):
        super().__init__()
        self.rope = rope
        self.frames: list[int] | None = None

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.frames is None:
            return self.rope(hidden_states)
        batch, channels, _, height, width = hidden_states.shape
        whole_clip = hidden_states.new_empty(1).expand(batch, channels, self.frames[-1] + 1, height, width)
        return tuple(
            angles.unflatten(1, (self.frames[-1] + 1, -1))[:, self.frames].flatten(1, 2)
            for angles in self.rope(whole_clip)
        )


def choose_frames(rng: random.Random, available: int, wanted: int) -> list[int]:
    """Evenly spaced latent frames, near together or far apart."""
    stride = rng.randint(1, (available - 1) // (wanted - 1))
    first = rng.randint(0, available - 1 - stride * (wanted - 1))
    return [first + stride * index for index in range(wanted)]


def train_transformer(
    folder: Path,
    latents_folder: Path,
    phases: list[Phase],
    device: torch.device,
    *,
    minutes: float,
    call_minutes: float | None,
    lr: float,
) -> TinyWan | None:
    """Train through the phases. Returns the finished model, or None when time ran out before."""
    torch.manual_seed(0)
    model = TinyWan().to(device)
    positions = model.transformer.rope = SelectedFrames(model.transformer.rope)
    if device.type == "cuda":  # 1.8 times as many steps
        model.transformer.compile_repeated_blocks()
    run = TrainingRun(
        folder,
        model,
        lr=lr,
        minutes=minutes,
        call_minutes=call_minutes,
        adamw_only=("shared", "relative_attention_bias", "patch_embedding", "proj_out", "scale_shift_table"),
    )
    current = None
    with progress_bar("Transformer", run) as report:
        while not run.out_of_time:
            # Seeded by the step, so that a run which was interrupted goes on as it would have.
            rng = random.Random(run.step)
            torch.manual_seed(run.step)
            phase = next(phase for phase in phases if run.progress < phase.until)
            if phase.clips != current:
                current = phase.clips
                latents, captions = load_clips(latents_folder, current, device)
            picks = [rng.randrange(len(latents)) for _ in range(phase.batch_size)]
            batch = latents[picks]
            positions.frames = None
            if phase.latent_frames is not None:
                positions.frames = choose_frames(rng, batch.shape[2], phase.latent_frames)
                batch = batch[:, :, positions.frames]
            texts = ["" if rng.random() < CAPTION_DROPOUT else captions[pick] for pick in picks]
            with autocast(device):
                loss = model.loss(batch.float(), texts, phase.shift, rng.choice(PADDED_LENGTHS))
            loss.backward()
            run.update()
            report(**{f"loss {phase.clips.name}": loss.detach()})
    run.save()
    if not run.finished:
        return None
    run.average.copy_to_module()
    model.transformer.rope = positions.rope
    return model
