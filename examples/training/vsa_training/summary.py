"""What a training says at its start: what learns, what is sparse, on which clips, for how long, and from where on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from vsa_diffusers.models import require_family
from vsa_diffusers.pipeline import enabled_config

from .distillation import sparse_layers
from .learning_rates import LearningRates
from .options import Options
from .parameters import is_gate, is_lora

if TYPE_CHECKING:
    from .trainer import Trainer


@dataclass(frozen=True)
class Counts:
    """Numbers of parameters: all, those that learn, and of these gates and LoRAs."""

    every: int
    learning: int
    gates: int
    lora: int


def counts_of(transformer: torch.nn.Module) -> Counts:
    """Count a transformer's parameters, before they are spread over processes."""
    sizes = [(name, each.numel(), each.requires_grad) for name, each in transformer.named_parameters()]
    learning = [(name, size) for name, size, learns in sizes if learns]
    return Counts(
        every=sum(size for _, size, _ in sizes),
        learning=sum(size for _, size in learning),
        gates=sum(size for name, size in learning if is_gate(name)),
        lora=sum(size for name, size in learning if is_lora(name)),
    )


def summary(trainer: Trainer, counts: Counts) -> str:
    """Lines for people."""
    options = trainer.options
    return "\n".join(
        [
            f"Trains {_what(options, counts)}: {counts.learning:,} of {counts.every:,} parameters of "
            f"{trainer.description.transformer}.",
            *_objective(trainer),
            _sparse(trainer.transformer, options),
            _data(trainer),
            _steps(trainer),
            f"{_optimizer(options)}, {_rates(trainer.rates, options)}.",
            _beginning(trainer),
        ]
    )


def _what(options: Options, counts: Counts) -> str:
    gates = f" and gates ({counts.gates:,})" if counts.gates else ""
    if options.rank:
        return f"a LoRA of rank {options.rank} ({counts.lora:,}){gates}"
    if options.trainable == "gates":
        return "gates"
    return {"all": "all weights", "attention": "video self-attention"}[options.trainable] + gates


def _objective(trainer: Trainer) -> list[str]:
    """Nothing of the usual objective."""
    options, distillation = trainer.options, trainer.distillation
    if distillation is None:
        return []
    layers = len(sparse_layers(trainer.transformer))
    attention = f", and {layers} layers' attention outputs (weight {options.distill_attention:g})"
    twice = (
        f"{trainer.held_twice:,} of its parameters are held twice" if trainer.held_twice else "nothing is held twice"
    )
    return [f"Distils: matches the dense model's output{attention if options.distill_attention else ''}; {twice}."]


def _sparse(transformer: torch.nn.Module, options: Options) -> str:
    names = list(require_family(transformer).video_modules(transformer))
    dense = sorted({layer % len(names) for layer in options.dense_layers})
    config = enabled_config(transformer)
    chosen = {"auto": "quarters" if config.combine == "merge" else "mean"}.get(config.selection, config.selection)
    block = " x ".join(map(str, config.block_size))
    end = options.ramp_start + options.ramp_steps
    ramp = f", falling from {options.first_ratio:g} over steps {options.ramp_start} to {end}"
    return (
        f"Sparse: {len(names) - len(dense)} of {len(names)} video self-attention layers "
        f"({'dense: ' + ', '.join(map(str, dense)) if dense else 'none dense'}), top_k_ratio {options.top_k_ratio:g}"
        f"{ramp if end else ''}, blocks of {block}, combine {config.combine}, "
        f"selection {chosen}."
    )


def _data(trainer: Trainer) -> str:
    made = trainer.description
    held_out = f"{len(trainer.held_out)} held out" if len(trainer.held_out) else "none held out: no validation loss"
    return (
        f"Data: {len(trainer.shards)} clips ({held_out}) of {made.num_frames} frames at {made.height} x {made.width}, "
        f"latents {list(trainer.shards.size or ())}."
    )


def _steps(trainer: Trainer) -> str:
    options, processes = trainer.options, trainer.accelerator.num_processes
    clips = options.train_batch_size * processes * options.gradient_accumulation_steps
    return (
        f"Steps: {options.max_train_steps} of {clips} clips (batches of {options.train_batch_size}, "
        f"{processes} {'process' if processes == 1 else 'processes'}, {options.gradient_accumulation_steps} batches a "
        f"step), {trainer.accelerator.mixed_precision} mixed precision."
    )


def _optimizer(options: Options) -> str:
    return {"muon": "Muon for the matrices of the blocks, AdamW for the rest", "adamw": "AdamW"}[options.optimizer]


def _rates(rates: LearningRates, options: Options) -> str:
    own = ", ".join(
        f"{ {'lr': 'learning rate', 'gate_lr': 'gates'}[name] } {value:g}" for name, value in rates.highest().items()
    )
    return f"{own}, {options.lr_scheduler} after {rates.stretches[-1].warmup} steps of warm-up"


def _beginning(trainer: Trainer) -> str:
    if trainer.resumed is None:
        return f"Begins anew in {trainer.folder}."
    total = trainer.options.max_train_steps
    told = f"Resumes from {trainer.resumed} at step {trainer.step} of {total}."
    stretch = trainer.rates.stretches[-1]
    if stretch.start == trainer.rates.count and len(trainer.rates.stretches) > 1:
        before = trainer.rates.stretches[-2].total
        told += (
            f" It was meant to have {before} steps: the learning rates go from {trainer.rates.before_last():.3g} to "
            f"{trainer.rates.factor(stretch.start + stretch.warmup):.3g} of their highest in {max(1, stretch.warmup)} "
            f"steps, and then along the curve of {total} steps."
        )
    later = [path.name for path in trainer.checkpoints.later(trainer.resumed)]
    if later:
        told += f" Its first checkpoint removes those of later steps: {', '.join(later)}."
    if trainer.step == total:
        told += " All steps are done: only the result is written again; a larger max_train_steps goes on."
    return told
