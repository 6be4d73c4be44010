"""The options of `train_vsa.py`, under the names that diffusers' own training scripts use.

The defaults are the recipe that docs/training.md recommends, with what it measured.
"""

from __future__ import annotations

import math
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from vsa_diffusers.extras import check_installed

from .learning_rates import SCHEDULES


def _option(default, text: str, **metadata):
    return field(default=default, metadata={"help": text, **metadata})


@dataclass
class Options:
    """What `--help` shows; checked when made."""

    pretrained_model_name_or_path: str = field(metadata={"help": "Pipeline: a directory or a repository on the Hub."})
    data_dir: str = field(metadata={"help": "Folder of shards that precompute_latents.py wrote."})
    output_dir: str = field(metadata={"help": "Folder for checkpoints, logs and the result."})
    subfolder: str = _option("transformer", "Which of the pipeline's transformers to train, such as transformer_2.")

    top_k_ratio: float = _option(0.125, "Share of key tiles kept in the end.")
    combine: str = _option("merge", "How the branches become one output.", choices=["gate", "merge", "sparse"])
    selection: str = _option("auto", "What key tiles are scored by.", choices=["auto", "mean", "quarters"])
    block_size: list[int] = field(
        default_factory=lambda: [4, 4, 4], metadata={"help": "Tokens per tile along time, height and width."}
    )
    dense_layers: list[str] = field(
        default_factory=lambda: ["0", "-1"],
        metadata={"help": "Video self-attention layers that stay dense; negative ones from the end; none for none."},
    )
    ramp_start: int = _option(0, "Steps before the ratio falls; dense ones, unless ratio_schedule begins lower.")
    ramp_steps: int = _option(0, "Steps in which the ratio falls to the target: sparsity annealing.")
    ramp_stages: int = _option(10, "Number of equal stages of that fall.")
    ratio_schedule: str | None = _option(
        None, "Ratios where that fall begins and ends, such as 0.5:0.125; from 1 to top_k_ratio if not given."
    )

    objective: str = _option(
        "diffusion",
        "What is learnt: diffusion, from the clips; or distill, to predict what the dense model does.",
        choices=["diffusion", "distill"],
    )
    distill_attention: float = _option(
        0.0, "With distill, weight of the error of the sparse layers' attention outputs; 0 leaves it out."
    )

    trainable: str = _option("all", "Without LoRA, what is trained.", choices=["all", "attention", "gates"])
    rank: int = _option(0, "Rank of a LoRA; 0 trains the weights themselves. Gates are always trained as they are.")
    lora_alpha: float | None = _option(None, "Scale of the LoRA; its rank if not given.")
    lora_dropout: float = _option(0.0, "Dropout inside the LoRA.")
    lora_target: str = _option(
        "attention",
        "Where the LoRA goes: attention (video self-attention), linear (all linear layers of the blocks), or names "
        "that peft understands, such as to_q,to_k.",
    )

    max_train_steps: int = _option(600, "Optimiser steps; more than a finished training had make it longer.")
    train_batch_size: int = _option(1, "Clips per step, on each process.")
    gradient_accumulation_steps: int = _option(8, "Batches per optimiser step.")
    optimizer: str = _option(
        "muon", "muon, for the matrices of the blocks, with AdamW for the rest; or AdamW.", choices=["muon", "adamw"]
    )
    learning_rate: float = _option(2e-4, "Of everything but gates.")
    gate_learning_rate: float = _option(1e-3, "Of gates, which begin at zero.")
    lr_scheduler: str = _option("cosine", "One of diffusers' schedules.", choices=list(SCHEDULES))
    lr_warmup_steps: int | None = _option(
        None, "Steps in which the learning rates rise; a twentieth of all steps if not given."
    )
    adam_beta1: float = _option(0.9, "Of AdamW.")
    adam_beta2: float = _option(0.99, "Of AdamW.")
    adam_weight_decay: float = _option(0.0, "Of AdamW, and of Muon.")
    adam_epsilon: float = _option(1e-8, "Of AdamW.")
    max_grad_norm: float = _option(1.0, "Gradients are clipped to this norm.")
    use_ema: bool = _option(False, "Average the weights, and validate and save the average.")
    ema_decay: float = _option(0.999, "Of that average; it warms up.")

    weighting_scheme: str = _option(
        "logit_normal", "How noise levels are drawn, before the shift.", choices=["logit_normal", "mode", "none"]
    )
    logit_mean: float = _option(0.0, "Of logit_normal.")
    logit_std: float = _option(1.0, "Of logit_normal.")
    mode_scale: float = _option(1.29, "Of mode.")
    shift: float | None = _option(
        None, "Of the noise levels towards noise; that of the model's scheduler if not given."
    )
    min_sigma: float = _option(0.0, "Lowest noise level to train, such as 0.875 for the first of two experts.")
    max_sigma: float = _option(1.0, "Highest noise level to train.")

    mixed_precision: str | None = _option(
        None, "Accelerate's own setting if not given.", choices=["no", "fp16", "bf16"]
    )
    result_dtype: str = _option("float32", "Of the result.", choices=["float32", "bfloat16", "float16"])
    gradient_checkpointing: bool = _option(False, "Recompute blocks in the backward pass, to save memory.")
    find_unused_parameters: bool = _option(False, "For models some of whose parameters take no part in a step.")
    dataloader_num_workers: int = _option(2, "Processes that read shards.")
    seed: int = _option(0, "Of the order of clips, noise and noise levels.")

    checkpointing_steps: int = _option(500, "Save a checkpoint after so many steps.")
    checkpoints_total_limit: int | None = _option(3, "Keep so many of them.")
    resume_from_checkpoint: str | None = _option("latest", "A checkpoint's folder, latest (if there is one), or none.")

    validation_shards: int = _option(1, "The last shards, held out for the validation loss.")
    validation_steps: int = _option(500, "Validate after so many steps, and at the end.")
    validation_sigmas: int = _option(4, "Noise levels at which each held-out clip is judged.")
    validation_prompts: list[str] = field(
        default_factory=list, metadata={"help": "Prompts to make videos of when validating."}
    )
    num_inference_steps: int = _option(30, "Of these videos.")
    guidance_scale: float = _option(5.0, "Of these videos.")

    report_to: str = _option("none", "Trackers, comma-separated: tensorboard, wandb, or others of accelerate; none.")
    tracker_project_name: str = _option("vsa", "The project's name there.")

    def __post_init__(self) -> None:
        self.dense_layers = _layers(self.dense_layers)
        for names, (check, what) in _BOUNDS.items():
            for name in names:
                value = getattr(self, name)
                if value is not None and not check(value):
                    raise ValueError(f"{name}={value!r} must be {what}.")
        if len(self.block_size) != 3:
            raise ValueError(f"block_size={self.block_size} must be three numbers, such as 4 4 4.")
        for each in fields(self):
            choices, name, value = each.metadata.get("choices"), each.name, getattr(self, each.name)
            if choices is not None and value is not None and value not in choices:
                raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(choices)}.")
        if not 0 <= self.min_sigma < self.max_sigma <= 1:
            raise ValueError(f"min_sigma={self.min_sigma} and max_sigma={self.max_sigma} must be in 0 to 1, in order.")
        if self.rank and self.trainable != "all":
            raise ValueError(f"rank={self.rank} trains a LoRA and gates; trainable={self.trainable!r} is for rank=0.")
        if self.rank:
            check_installed("peft", extra="train")
        if self.trainable == "gates" and self.combine != "gate":
            raise ValueError(f'trainable="gates" needs combine="gate"; combine={self.combine!r} has none.')
        self._check_objective()
        self._check_schedule()
        if self.ramp_start + self.ramp_steps > self.max_train_steps:
            raise ValueError(
                f"ramp_start={self.ramp_start} and ramp_steps={self.ramp_steps} end after "
                f"max_train_steps={self.max_train_steps}; the target ratio would never be trained."
            )
        if self.warmup_steps >= self.max_train_steps and self.lr_scheduler != "constant":
            raise ValueError(
                f"lr_warmup_steps={self.lr_warmup_steps} must be less than max_train_steps={self.max_train_steps}."
            )

    def _check_objective(self) -> None:
        if self.distill_attention and self.objective != "distill":
            raise ValueError(
                f'distill_attention={self.distill_attention} needs objective="distill"; '
                f"objective={self.objective!r} has no dense model to match."
            )

    def _check_schedule(self) -> None:
        if self.ratio_schedule is None:
            return
        _, last = _ratios(self.ratio_schedule)
        if last != self.top_k_ratio:
            raise ValueError(
                f"ratio_schedule={self.ratio_schedule!r} ends at {last:g}, but top_k_ratio={self.top_k_ratio:g} is the "
                "ratio in the end; give both the same."
            )
        if not self.ramp_steps:
            raise ValueError(
                f"ratio_schedule={self.ratio_schedule!r} needs ramp_steps, the steps in which the ratio falls, such as "
                f"{max(1, self.max_train_steps // 2)}, half of all."
            )

    @property
    def first_ratio(self) -> float:
        """The ratio that the ramp begins at."""
        return 1.0 if self.ratio_schedule is None else _ratios(self.ratio_schedule)[0]

    @property
    def warmup_steps(self) -> int:
        """`lr_warmup_steps`, or its default."""
        return self.max_train_steps // 20 if self.lr_warmup_steps is None else self.lr_warmup_steps


def defaults() -> dict[str, Any]:
    """Those of options by name. A new option's is what was done before: older checkpoints are taken to have it."""
    return {each.name: each.default for each in fields(Options) if each.default is not MISSING}


def _layers(given: list[Any]) -> list[int]:
    if list(given) == ["none"]:
        return []
    try:
        return [int(layer) for layer in given]
    except ValueError as error:
        raise ValueError(f"dense_layers={given} must be whole numbers, such as 0 -1, or none.") from error


def _ratios(schedule: str) -> tuple[float, float]:
    """Where `ratio_schedule` begins and ends."""
    try:
        first, last = map(float, schedule.split(":"))
    except ValueError:
        first = last = math.nan
    if not 0 < last <= first <= 1:
        raise ValueError(f"ratio_schedule={schedule!r} must be two ratios in (0, 1] that fall, such as 0.5:0.125.")
    return first, last


def _finite(value: float) -> bool:
    return math.isfinite(value)


# What options must be, by the check for it; `None` is allowed where it is the default.
_BOUNDS: dict[tuple[str, ...], tuple[Any, str]] = {
    (
        "max_train_steps", "train_batch_size", "gradient_accumulation_steps", "checkpointing_steps", "validation_steps",
        "validation_sigmas", "ramp_stages", "checkpoints_total_limit", "num_inference_steps",
    ): (lambda value: value >= 1, "at least 1"),
    (
        "ramp_start", "ramp_steps", "rank", "lr_warmup_steps", "validation_shards", "dataloader_num_workers", "seed",
    ): (lambda value: value >= 0, "0 or more"),
    ("learning_rate", "gate_learning_rate", "adam_epsilon", "max_grad_norm", "lora_alpha", "shift", "logit_std"): (
        lambda value: _finite(value) and value > 0, "a positive number",
    ),
    ("adam_beta1", "adam_beta2", "ema_decay", "lora_dropout"): (lambda value: 0 <= value < 1, "in 0 to 1, 1 left out"),
    ("adam_weight_decay", "distill_attention"): (lambda value: _finite(value) and value >= 0, "0 or more"),
    ("logit_mean", "mode_scale", "guidance_scale"): (_finite, "a finite number"),
    ("top_k_ratio",): (lambda value: 0 < value <= 1, "in (0, 1], the share of key tiles kept, such as 0.125"),
}  # fmt: skip
