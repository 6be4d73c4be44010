"""The training loop.

All randomness of a step is drawn anew from the seed, the step and the process, and the order of clips is a function of
the seed: a training that goes on from a checkpoint sees just what it would have seen.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, ProjectConfiguration, set_seed
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from diffusers.training_utils import EMAModel, compute_density_for_timestep_sampling
from torch.utils.data import DataLoader
from tqdm import tqdm

from vsa_diffusers import save_vsa, set_top_k_ratio

from .averages import averages_in_place, learning_parameters
from .checkpoints import Checkpoints, whole_state_dict
from .dataset import BatchOrder, Sample, Shards, collate, split_shards
from .description import Description
from .distillation import Distillation, dense_teacher, keep_apart
from .identity import module_digest
from .learning_rates import LearningRates
from .metrics import MetricsLog
from .models import load_transformer, prepare_transformer, shrink_frozen, vsa_config
from .objective import add_noise, logit_normal_quantiles, shift_sigmas, velocity_error
from .options import Options, defaults
from .parameters import make_optimizers
from .sparsity import SparsityRamp
from .summary import counts_of, summary
from .validation import log_videos, predict, validation_loss, validation_videos

# Options that may differ when a training goes on: they do not decide what is learnt until then.
FREE_OPTIONS = (
    "checkpointing_steps", "checkpoints_total_limit", "data_dir", "dataloader_num_workers", "find_unused_parameters",
    "gradient_checkpointing", "guidance_scale", "lr_warmup_steps", "max_train_steps", "num_inference_steps",
    "output_dir", "pretrained_model_name_or_path", "report_to", "result_dtype", "resume_from_checkpoint",
    "tracker_project_name", "validation_prompts", "validation_sigmas", "validation_steps",
)  # fmt: skip


class Trainer:
    """Everything that one training holds.

    Args:
        options: what was asked for.
    """

    def __init__(self, options: Options):
        self.options = options
        self.folder = Path(options.output_dir)
        trackers = [] if options.report_to == "none" else options.report_to.split(",")
        self.accelerator = Accelerator(
            gradient_accumulation_steps=options.gradient_accumulation_steps,
            mixed_precision=options.mixed_precision,
            log_with=trackers or None,
            project_config=ProjectConfiguration(str(self.folder), str(self.folder / "logs")),
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=options.find_unused_parameters)],
        )
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            raise ValueError(
                "DeepSpeed keeps its own checkpoints, which this script does not; launch with FSDP or DDP."
            )
        sharded = self.accelerator.distributed_type == DistributedType.FSDP
        if sharded and options.objective == "distill" and not self.accelerator.is_fsdp2:
            raise ValueError(
                'objective="distill" shards its teacher with FSDP 2, and this is FSDP 1; launch with --fsdp_version=2.'
            )
        if sharded:
            # Accelerate's broadcast from one process fails on parameters that belong to no submodule.
            self.accelerator.state.fsdp_plugin.cpu_ram_efficient_loading = False
        set_seed(options.seed)
        self.description = Description.load(Path(options.data_dir))
        train, held_out = split_shards(Path(options.data_dir), options.validation_shards)
        self.shards, self.held_out = Shards(train), Shards(held_out)
        self.ramp = SparsityRamp(
            options.top_k_ratio, options.ramp_steps, options.ramp_start, options.ramp_stages, options.first_ratio
        )
        self.shift = self.description.shift if options.shift is None else options.shift

        # Sharded and wrapped models are reached through this one, which stays what it is.
        self.transformer = load_transformer(options, self.description)
        self.teacher = dense_teacher(self.transformer) if options.objective == "distill" else None
        prepare_transformer(self.transformer, options)
        self.held_twice = 0 if self.teacher is None else keep_apart(self.teacher, everything=sharded)
        # Before types and places change, so that it is the same wherever the training goes on.
        self.teacher_digest = None if self.teacher is None else module_digest(self.teacher)
        # Where they are not part of the result; FSDP wants one dtype for all.
        frozen_stay = options.rank or options.trainable == "gates"
        if self.accelerator.mixed_precision == "bf16" and frozen_stay and not sharded:
            shrink_frozen(self.transformer, torch.bfloat16)
        if self.teacher is not None and self.accelerator.mixed_precision == "bf16" and not sharded:
            # What it shares stays as the student needs it: where that is part of the result, in fp32.
            shrink_frozen(self.teacher, torch.bfloat16, but=self.transformer)
        # Of a sharded model, parameters know only a process's part.
        counts = counts_of(self.transformer)
        optimizers = make_optimizers(
            self.transformer,
            options.optimizer,
            options.learning_rate,
            options.gate_learning_rate,
            betas=(options.adam_beta1, options.adam_beta2),
            eps=options.adam_epsilon,
            weight_decay=options.adam_weight_decay,
        )
        if self.accelerator.mixed_precision == "fp16" and len(optimizers) > 1:
            # Accelerate would unscale the gradients of the second one twice.
            raise ValueError(
                f"optimizer={options.optimizer} is two optimisers, for which fp16 cannot scale gradients; take "
                "mixed_precision=bf16, or optimizer=adamw."
            )
        self.model, *self.optimizers = self.accelerator.prepare(self.transformer, *optimizers)
        self.distillation = None if self.teacher is None else self._distillation(self.teacher, sharded)
        self.rates = LearningRates(
            [each.optimizer for each in self.optimizers], options.lr_scheduler, options.max_train_steps,
            options.warmup_steps,
        )  # fmt: skip
        self.ema = (
            EMAModel(learning_parameters(self.model), decay=options.ema_decay, use_ema_warmup=True)
            if options.use_ema
            else None
        )
        self.checkpoints = Checkpoints(
            self.folder, self.accelerator, self.model, self.transformer, self.optimizers, self.rates, self.ema,
            options.checkpoints_total_limit,
        )  # fmt: skip
        self.step = 0
        self.resumed = self.checkpoints.choose(options.resume_from_checkpoint)
        if self.resumed is not None:
            self.step = self.checkpoints.load(self.resumed, self._fingerprint(), defaults())
        # What cannot be written to is told now, not after the first step.
        self.folder.mkdir(parents=True, exist_ok=True)
        self.accelerator.print(summary(self, counts))
        self.pipe: diffusers.DiffusionPipeline | None = None

    def train(self) -> Path:
        """Run to the end, and write the result.

        Returns:
            The folder that `load_vsa` reads.
        """
        # What tensorboard was told of steps that will be done again is taken back.
        again = {"tensorboard": {"purge_step": self.step + 1}}
        self.accelerator.init_trackers(self.options.tracker_project_name, _flat(asdict(self.options)), again)
        if self.accelerator.is_main_process:
            self.log = MetricsLog(self.folder / "metrics.jsonl", self.step)
            if self.log.torn:
                self.accelerator.print(f"{self.log.path} had {self.log.torn} lines that are no records: cut.")
        bar = tqdm(
            initial=self.step,
            total=self.options.max_train_steps,
            desc="Training",
            disable=not self.accelerator.is_local_main_process,
        )
        batches = iter(self._loader())
        while self.step < self.options.max_train_steps:
            report = self._train_step(batches)
            bar.update()
            bar.set_postfix(loss=f"{report['loss']:.4f}", ratio=f"{report['top_k_ratio']:.3g}")
            last = self.step == self.options.max_train_steps
            if self.step % self.options.validation_steps == 0 or last:
                report |= self._validate()
            self._log(report)
            if self.step % self.options.checkpointing_steps == 0 or last:
                self.checkpoints.save(self.step, self._fingerprint())
        bar.close()
        result = self._save_result()
        self.accelerator.end_training()
        return result

    def _train_step(self, batches) -> dict[str, float]:
        """One optimiser step over all its batches; counts it, and reports on it."""
        ratio = self.ramp.ratio(self.step)
        set_top_k_ratio(self.transformer, ratio)
        losses: dict[str, list[torch.Tensor]] = defaultdict(list)
        for turn in range(self.options.gradient_accumulation_steps):
            with self.accelerator.accumulate(self.model):
                found = self._losses(next(batches).to(self.accelerator.device, torch.float32), turn)
                self.accelerator.backward(found["loss"])
                for name, value in found.items():
                    losses[name].append(value.detach())
                if self.accelerator.sync_gradients:
                    norm = self.accelerator.clip_grad_norm_(learning_parameters(self.model), self.options.max_grad_norm)
                for optimizer in self.optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
        rates = self.rates.current()
        if not self.accelerator.optimizer_step_was_skipped:
            self.rates.step()
        if self.ema is not None:
            self.ema.step(learning_parameters(self.model))
        self.step += 1
        means = torch.stack([torch.stack(each).mean() for each in losses.values()])
        report = dict(zip(losses, self.accelerator.reduce(means, "mean").tolist(), strict=True))
        loss = report["loss"]
        # With fp16, gradients may overflow: the step is left out, and the scale falls.
        if not math.isfinite(loss) or (self.accelerator.scaler is None and not math.isfinite(norm)):
            raise RuntimeError(
                f"The loss is {loss}, the norm of the gradients {float(norm)} at step {self.step}; lower learning_rate "
                "or gate_learning_rate, and go on from the last checkpoint."
            )
        return report | {"grad_norm": float(norm), "top_k_ratio": ratio} | rates

    def _losses(self, batch: Sample, turn: int) -> dict[str, torch.Tensor]:
        """The loss to minimise, `loss`, and its parts where it has some."""
        accelerator, clean = self.accelerator, batch.clean
        place = (self.step * self.options.gradient_accumulation_steps + turn) * accelerator.num_processes
        # Also seeds dropout.
        torch.manual_seed((self.options.seed << 40) + place + accelerator.process_index)
        noise = torch.randn(clean.shape).to(clean)
        sigmas = self._draw_sigmas(len(clean)).to(clean)
        noisy = add_noise(clean, noise, sigmas)

        def prediction(model: torch.nn.Module) -> torch.Tensor:
            with accelerator.autocast():
                return predict(model, batch, noisy, sigmas, self.description.channel_axis)

        if self.distillation is not None:
            return self.distillation.losses(self.model, prediction)
        return {"loss": velocity_error(prediction(self.model), clean, noise).mean()}

    def _distillation(self, teacher: torch.nn.Module, sharded: bool) -> Distillation:
        """The teacher where the model is, spread over processes if that is."""
        teacher.requires_grad_(False)
        if sharded:
            teacher = fsdp2_prepare_model(self.accelerator, teacher)
        else:
            teacher.to(self.accelerator.device)
        return Distillation(teacher, self.transformer, self.options.distill_attention)

    def _draw_sigmas(self, count: int) -> torch.Tensor:
        """Noise levels of the options' distribution, those outside of its bounds drawn again."""
        options = self.options
        candidates = compute_density_for_timestep_sampling(
            options.weighting_scheme, 64 * count, options.logit_mean, options.logit_std, options.mode_scale
        )
        candidates = shift_sigmas(candidates, self.shift).view(count, 64)
        fits = (candidates >= options.min_sigma) & (candidates <= options.max_sigma)
        chosen = candidates.gather(1, fits.int().argmax(1, keepdim=True)).squeeze(1)
        # At 0 there is nothing to predict from.
        return chosen.clamp(max(options.min_sigma, 1e-3), options.max_sigma)

    def _judged_sigmas(self) -> torch.Tensor:
        """Noise levels of the validation: evenly spread over what the options' bounds leave of the distribution."""
        options = self.options
        sigmas = logit_normal_quantiles((torch.arange(4096) + 0.5) / 4096, self.shift)
        sigmas = sigmas[(sigmas >= options.min_sigma) & (sigmas <= options.max_sigma)]
        count = options.validation_sigmas
        return sigmas[((torch.arange(count) + 0.5) / count * len(sigmas)).long()]

    def _loader(self) -> DataLoader:
        """The batches of this process that are still to come."""
        turns = self.options.gradient_accumulation_steps
        order = BatchOrder(
            self.shards.kinds(),
            self.options.train_batch_size,
            self.options.seed,
            self.accelerator.process_index,
            self.accelerator.num_processes,
            first_batch=self.step * turns,
            batches=self.options.max_train_steps * turns,
        )
        return DataLoader(
            self.shards, batch_sampler=order, collate_fn=collate, num_workers=self.options.dataloader_num_workers
        )

    def _validate(self) -> dict[str, float]:
        """Loss and videos at the target ratio, of the averaged weights if there are some."""
        set_top_k_ratio(self.transformer, self.options.top_k_ratio)
        report = {}
        with averages_in_place(self.ema, self.model):
            if len(self.held_out):
                report["validation_loss"] = validation_loss(
                    self.accelerator, self.model, self.held_out, self.description.channel_axis, self._judged_sigmas(),
                )  # fmt: skip
            if self.options.validation_prompts:
                self._make_videos()
        return report

    def _make_videos(self) -> None:
        """Every process runs a sharded model; otherwise the main process is enough."""
        accelerator, description, options = self.accelerator, self.description, self.options
        if accelerator.is_main_process or accelerator.distributed_type == DistributedType.FSDP:
            self.transformer.eval()
            if self.pipe is None:
                self.pipe = diffusers.DiffusionPipeline.from_pretrained(
                    options.pretrained_model_name_or_path, **{options.subfolder: self.transformer}
                )
                self.pipe.set_progress_bar_config(disable=True)
                for part in self.pipe.components.values():
                    if isinstance(part, torch.nn.Module) and part is not self.transformer:
                        part.to(accelerator.device)
            sizes = dict(height=description.height, width=description.width, num_frames=description.num_frames)
            steps = dict(num_inference_steps=options.num_inference_steps, guidance_scale=options.guidance_scale)
            with accelerator.autocast():
                videos = validation_videos(
                    self.pipe, options.validation_prompts, description.call | sizes | steps, options.seed
                )
            self.transformer.train()
            if accelerator.is_main_process:
                log_videos(
                    accelerator, self.folder / "validation", videos, options.validation_prompts, description.fps,
                    self.step,
                )  # fmt: skip
        accelerator.wait_for_everyone()

    def _save_result(self) -> Path:
        """What `load_vsa` reads, with the averaged weights if there are some."""
        if self.ema is not None:
            self.ema.copy_to(learning_parameters(self.model))
        weights = whole_state_dict(self.model)
        path = self.folder / "final"
        if self.accelerator.is_main_process:
            save_vsa(
                self.transformer, path, config=vsa_config(self.options), state_dict=weights,
                contents="gates" if self.options.trainable == "gates" else "auto",
                dtype=getattr(torch, self.options.result_dtype),
            )  # fmt: skip
        self.accelerator.wait_for_everyone()
        return path

    def _fingerprint(self) -> dict[str, Any]:
        """What has to be the same for a training to go on."""
        options = {name: value for name, value in asdict(self.options).items() if name not in FREE_OPTIONS}
        teacher = {} if self.teacher_digest is None else {"teacher": self.teacher_digest}
        return options | teacher | {
            "processes": self.accelerator.num_processes,
            # As accelerate was configured, where the option leaves it to that.
            "mixed_precision": str(self.accelerator.mixed_precision),
            "training clips": self.shards.digest(),
        }  # fmt: skip

    def _log(self, report: dict[str, float]) -> None:
        self.accelerator.log(report, step=self.step)
        if self.accelerator.is_main_process:
            self.log.append({"step": self.step} | report)


def _flat(options: dict[str, Any]) -> dict[str, Any]:
    """Trackers take plain values only."""
    return {
        name: value if isinstance(value, (int, float, str, bool)) else str(value) for name, value in options.items()
    }
