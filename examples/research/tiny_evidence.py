"""The experiment of `vsa_evidence.py`: fine-tune the tiny Wan model in one of several ways, and measure its loss."""

from __future__ import annotations

import copy
import math
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import WanPipeline, WanTransformer3DModel
from merge_gate import add_gates_to_merge
from procedural_video import sample_scene
from vsa_training.distillation import Distillation
from vsa_training.objective import add_noise, logit_normal_quantiles, velocity_error
from vsa_training.parameters import choose_trainable, make_optimizers
from vsa_training.sparsity import SparsityRamp

from tiny_wan_parts import normalise_latents
from tiny_wan_training import autocast
from tiny_wan_transformer import CAPTION_DROPOUT, SHARD, Clips, encode_clips, load_clips
from tiny_wan_vae import encode_scenes
from vsa_diffusers import add_gate_compress, disable_vsa, enable_vsa, set_top_k_ratio


@dataclass(frozen=True)
class Variant:
    """How a model attends; with `combine=None` densely."""

    combine: str | None
    selection: str = "mean"
    gates: bool = False  # it has trained gates, beside the coarse branch
    in_package: bool = True  # `save_vsa` can save it


VARIANTS = {
    "dense": Variant(None),
    "sparse": Variant("sparse"),
    "merge": Variant("merge"),
    "merge_quarters": Variant("merge", "quarters"),
    "gate": Variant("gate", gates=True),
    "gate_quarters": Variant("gate", "quarters", gates=True),
    "merge_gate": Variant("merge", gates=True, in_package=False),
}
# Padding is attended to; this is the length that the model's recommended settings use.
TEXT_TOKENS = 32


@dataclass
class Material:
    """Clips to train on, and held-out ones with noise and noise levels that never change.

    Shapes: `latents` and `held_out` `[clips, channels, frames, height, width]`, embeddings `[clips, tokens, channels]`;
    `noise` and `sigmas` have the held-out clips' first axis times the number of noise levels of each.
    """

    latents: torch.Tensor
    embeds: torch.Tensor
    no_caption: torch.Tensor
    held_out: torch.Tensor
    held_out_embeds: torch.Tensor
    noise: torch.Tensor
    sigmas: torch.Tensor


@dataclass(frozen=True)
class Recipe:
    """How a model is fine-tuned. Learning rates warm up over a twentieth of the steps and fall to 0 with a cosine."""

    steps: int
    batch_size: int
    lr: float
    gate_lr: float
    ramp: float
    trainable: str
    shift: float
    optimizer: str = "adamw"
    dense_layers: tuple[int, ...] = ()
    compile: bool = False
    block_size: tuple[int, int, int] = (4, 4, 4)
    max_norm: float = 1.0
    first_ratio: float = 1.0  # where the ramp begins
    objective: str = "diffusion"  # or distill
    distill_attention: float = 0.0


def load_material(
    pipe: WanPipeline, folder: Path, clips: Clips, held_out: int, levels: int, shift: float, device: torch.device
) -> Material:
    """Read the clips' latents, first encoding those that are missing in `folder`, and encode held-out scenes."""
    if clips.count % SHARD:
        raise ValueError(f"clips.count={clips.count} must be a multiple of {SHARD}, the size of a shard.")
    encode_clips(folder, pipe.vae, clips, device)
    latents, captions = (each[: clips.count] for each in load_clips(folder, clips, device))
    scenes = [sample_scene(seed, split="held_out") for seed in range(held_out)]
    vae = copy.deepcopy(pipe.vae).to(device)
    held_out_latents = normalise_latents(vae, encode_scenes(vae, scenes, clips.side, clips.frames, device))
    embed = lambda texts: embed_captions(pipe, texts, device)  # noqa: E731
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn((held_out * levels, *latents.shape[1:]), generator=generator)
    quantiles = (torch.arange(levels) + 0.5) / levels
    sigmas = logit_normal_quantiles(quantiles, shift).repeat(held_out)
    return Material(
        latents=latents,
        embeds=embed(captions),
        no_caption=embed([""]),
        held_out=held_out_latents,
        held_out_embeds=embed([scene.caption for scene in scenes]),
        noise=noise.to(device),
        sigmas=sigmas.to(device),
    )


@torch.no_grad()
def embed_captions(pipe: WanPipeline, captions: list[str], device: torch.device) -> torch.Tensor:
    """As the pipeline does, each distinct caption once."""
    pipe.text_encoder.to(device)
    distinct = sorted(set(captions))
    embeds = [
        pipe.encode_prompt(
            distinct[first : first + 256],
            do_classifier_free_guidance=False,
            max_sequence_length=TEXT_TOKENS,
            device=device,
        )[0].float()
        for first in range(0, len(distinct), 256)
    ]
    place = {caption: index for index, caption in enumerate(distinct)}
    return torch.cat(embeds)[[place[caption] for caption in captions]]


def prepare(
    base: WanTransformer3DModel, variant: str, ratio: float, device: torch.device, recipe: Recipe
) -> WanTransformer3DModel:
    """A copy of the model that attends as `variant` says, with new gates where it has some."""
    model = copy.deepcopy(base).to(device)
    how = VARIANTS[variant]
    if how.gates:
        add_gate_compress(model)
    if how.combine is not None:
        sparsify(model, ratio, how, recipe)
    if not how.in_package:
        add_gates_to_merge(model)
    return model


def sparsify(model: WanTransformer3DModel, ratio: float, how: Variant, recipe: Recipe) -> None:
    """Enable VSA with the recipe's blocks and dense layers."""
    enable_vsa(
        model,
        ratio,
        block_size=recipe.block_size,
        combine=how.combine,
        selection=how.selection,
        dense_layers=recipe.dense_layers,
    )


@torch.no_grad()
@torch.compiler.set_stance("force_eager")
def validation_loss(model: WanTransformer3DModel, material: Material, batch_size: int) -> list[float]:
    """Mean loss at each noise level, from low to high; the same clips, noise and levels for every model."""
    model.eval()
    levels = len(material.noise) // len(material.held_out)
    clip = torch.arange(len(material.noise), device=material.noise.device) // levels
    errors = []
    for rows in torch.arange(len(material.noise), device=clip.device).split(batch_size):
        clean, embeds = material.held_out[clip[rows]], material.held_out_embeds[clip[rows]]
        errors.append(_errors(model, clean, material.noise[rows], material.sigmas[rows], embeds))
    return torch.cat(errors).view(-1, levels).mean(0).tolist()


def losses_by_ratio(
    model: WanTransformer3DModel,
    variant: str,
    ratios: Iterable[float],
    material: Material,
    recipe: Recipe,
) -> dict[str, list[float]]:
    """`validation_loss` at every ratio, under the ratio's text form. A dense model is judged as merge there."""
    losses = {}
    for ratio in ratios:
        if variant == "dense":
            sparsify(model, ratio, VARIANTS["merge"], recipe)
        else:
            set_top_k_ratio(model, ratio)
        losses[f"{ratio:g}"] = validation_loss(model, material, recipe.batch_size)
    if variant == "dense":
        disable_vsa(model)
        losses["1"] = validation_loss(model, material, recipe.batch_size)
    return losses


def fine_tune(
    model: WanTransformer3DModel,
    variant: str,
    ratio: float,
    material: Material,
    recipe: Recipe,
    seed: int,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
    teacher: WanTransformer3DModel | None = None,
) -> dict:
    """Train in place. Clips, noise and levels follow from `seed` and the step alone, so variants see the same.

    Args:
        teacher: the dense model, for `recipe.objective="distill"`; a dense `variant` has no use for it.

    Returns:
        `seconds`, and the `curve` of training losses, a mean over each twentieth of the steps.
    """
    if recipe.compile:  # block by block: they share their code; validation, at many ratios, stays eager
        for block in model.blocks:
            block.compile()
    choose_trainable(model.train(), "all" if variant == "dense" and recipe.trainable == "gates" else recipe.trainable)
    ramp = SparsityRamp(ratio, steps=round(recipe.ramp * recipe.steps), first=max(ratio, recipe.first_ratio))
    distillation = None
    if recipe.objective == "distill" and variant != "dense":
        distillation = Distillation(teacher, model, recipe.distill_attention)
    optimizers = make_optimizers(model, recipe.optimizer, recipe.lr, recipe.gate_lr)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(each, lambda step: _warm_cosine(step, recipe.steps)) for each in optimizers
    ]
    losses = []
    started = time.monotonic()
    for step in range(recipe.steps):
        if variant != "dense":
            set_top_k_ratio(model, ramp.ratio(step))
        batch = _batch(material, recipe, seed, step)
        if distillation is None:
            loss = _errors(model, *batch).mean()
        else:
            loss = distillation.losses(model, lambda each, batch=batch: _predict(each, *batch))["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_norm)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
        if step % 20 == 19:
            on_step(step + 1, loss.item())
    curve = [part.mean().item() for part in torch.stack(losses).split(max(1, recipe.steps // 20))]
    return {"seconds": round(time.monotonic() - started, 2), "curve": curve}


def _batch(material: Material, recipe: Recipe, seed: int, step: int) -> tuple[torch.Tensor, ...]:
    """Clean latents, noise, noise levels and embeddings of one step."""
    rng = random.Random(f"{seed}-{step}")
    device = material.latents.device
    generator = torch.Generator(device).manual_seed(rng.getrandbits(62))
    picks = [rng.randrange(len(material.latents)) for _ in range(recipe.batch_size)]
    clean = material.latents[picks].float()
    embeds = material.embeds[picks].clone()
    embeds[[rng.random() < CAPTION_DROPOUT for _ in picks]] = material.no_caption
    noise = torch.randn(clean.shape, generator=generator, device=device)
    quantiles = torch.rand(len(picks), generator=generator, device=device).clamp(1e-6, 1 - 1e-6)
    return clean, noise, logit_normal_quantiles(quantiles, recipe.shift), embeds


def _errors(model, clean, noise, sigmas, embeds) -> torch.Tensor:
    return velocity_error(_predict(model, clean, noise, sigmas, embeds), clean, noise)


def _predict(model, clean, noise, sigmas, embeds) -> torch.Tensor:
    with autocast(clean.device):
        return model(add_noise(clean, noise, sigmas), 1000 * sigmas, embeds, return_dict=False)[0]


def _warm_cosine(step: int, steps: int) -> float:
    warmup = max(1, steps // 20)
    return min(1.0, (step + 1) / warmup) * (0.5 + 0.5 * math.cos(math.pi * min(1.0, step / steps)))
