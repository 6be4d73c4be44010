"""The options of `train_vsa.py`, under the names that diffusers' own training scripts use."""

from __future__ import annotations

from dataclasses import dataclass, field


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
    combine: str = _option("gate", "How the branches become one output.", choices=["gate", "merge", "sparse"])
    selection: str = _option("auto", "What key tiles are scored by.", choices=["auto", "mean", "quarters"])
    block_size: list[int] = field(
        default_factory=lambda: [4, 4, 4], metadata={"help": "Tokens per tile along time, height and width."}
    )
    dense_layers: list[int] = field(
        default_factory=list,
        metadata={"help": "Video self-attention layers that stay dense; negative ones from the end."},
    )
    ramp_start: int = _option(0, "Steps that stay dense before the ratio falls.")
    ramp_steps: int = _option(0, "Steps in which the ratio falls from 1 to the target.")
    ramp_stages: int = _option(10, "Number of equal stages of that fall.")

    trainable: str = _option("all", "Without LoRA, what is trained.", choices=["all", "attention", "gates"])
    rank: int = _option(0, "Rank of a LoRA; 0 trains the weights themselves. Gates are always trained as they are.")
    lora_alpha: float | None = _option(None, "Scale of the LoRA; its rank if not given.")
    lora_dropout: float = _option(0.0, "Dropout inside the LoRA.")
    lora_target: str = _option(
        "attention",
        "Where the LoRA goes: attention (video self-attention), linear (all linear layers of the blocks), or names "
        "that peft understands, such as to_q,to_k.",
    )

    max_train_steps: int = _option(1000, "Optimiser steps.")
    train_batch_size: int = _option(1, "Clips per step, on each process.")
    gradient_accumulation_steps: int = _option(1, "Batches per optimiser step.")
    learning_rate: float = _option(1e-5, "Of everything but gates.")
    gate_learning_rate: float = _option(1e-3, "Of gates, which begin at zero.")
    lr_scheduler: str = _option("constant_with_warmup", "A name that diffusers' get_scheduler knows.")
    lr_warmup_steps: int = _option(100, "Steps in which the learning rates rise.")
    adam_beta1: float = _option(0.9, "Of AdamW.")
    adam_beta2: float = _option(0.99, "Of AdamW.")
    adam_weight_decay: float = _option(0.0, "Of AdamW.")
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

    mixed_precision: str | None = _option(None, "no, fp16 or bf16; accelerate's own setting if not given.")
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
        positive = ("max_train_steps", "train_batch_size", "gradient_accumulation_steps", "checkpointing_steps",
                    "validation_steps", "validation_sigmas", "ramp_stages")  # fmt: skip
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if not 0 <= self.min_sigma < self.max_sigma <= 1:
            raise ValueError(f"min_sigma={self.min_sigma} and max_sigma={self.max_sigma} must be in 0 to 1, in order.")
        if self.rank and self.trainable != "all":
            raise ValueError(f"rank={self.rank} trains a LoRA and gates; trainable={self.trainable!r} is for rank=0.")
        if self.trainable == "gates" and self.combine != "gate":
            raise ValueError(f'trainable="gates" needs combine="gate"; combine={self.combine!r} has none.')
        if self.ramp_start + self.ramp_steps > self.max_train_steps:
            raise ValueError(
                f"ramp_start={self.ramp_start} and ramp_steps={self.ramp_steps} end after "
                f"max_train_steps={self.max_train_steps}; the target ratio would never be trained."
            )
