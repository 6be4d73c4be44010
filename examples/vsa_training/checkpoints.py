"""Checkpoints without pickle: safetensors and JSON, whole, whatever the model was spread over.

Noise, noise levels, dropout and the order of clips follow from the seed and the step (see `trainer.py`), so there are
no random states to keep.
"""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from .averages import averages_in_place, learning_parameters

STATE_NAME = "state.json"


def whole_state_dict(model: torch.nn.Module, trainable_only: bool = False) -> dict[str, torch.Tensor]:
    """The model's weights, on the CPU of the main process, under the names that they have without any wrapper.

    Every process has to call it.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=trainable_only)
    return get_model_state_dict(model, options=options)


class Checkpoints:
    """Writes and reads what a training needs to go on as if it had never stopped.

    Args:
        folder: holds one folder for each checkpoint.
        accelerator, model, optimizer: as prepared by accelerate.
        scheduler: of the learning rates.
        ema: of the parameters that learn, or `None`.
        keep: number of checkpoints that stay, or `None` for all.
    """

    def __init__(
        self,
        folder: Path,
        accelerator: Accelerator,
        model: torch.nn.Module,
        optimizer: Any,
        scheduler: Any,
        ema: EMAModel | None,
        keep: int | None,
    ):
        self.folder, self.accelerator, self.model = folder, accelerator, model
        self.optimizer, self.scheduler, self.ema, self.keep = optimizer, scheduler, ema, keep

    def save(self, step: int, fingerprint: dict[str, Any]) -> None:
        """Write `checkpoint-<step>`. A kill in between leaves no checkpoint that looks finished."""
        weights = whole_state_dict(self.model, trainable_only=True)
        averages = self._averages()
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
        state = get_optimizer_state_dict(self.model, self._inner_optimizer(), options=options)
        if self.accelerator.is_main_process:
            partial = self.folder / "checkpoint.partial"
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            moments = {f"{name}/{key}": value for name, each in state["state"].items() for key, value in each.items()}
            save_file(_ready(weights), partial / "weights.safetensors")
            save_file(_ready(moments), partial / "optimizer.safetensors")
            if averages is not None:
                save_file(_ready(averages), partial / "ema.safetensors")
            scaler = self.accelerator.scaler
            rest = {
                "step": step,
                "fingerprint": fingerprint,
                "optimizer": state["param_groups"],
                "scheduler": self.scheduler.state_dict(),
                "ema_step": self.ema.optimization_step if self.ema else None,
                "scaler": scaler.state_dict() if scaler is not None else None,
            }
            (partial / STATE_NAME).write_text(json.dumps(rest))
            final = self.folder / f"checkpoint-{step:07d}"
            shutil.rmtree(final, ignore_errors=True)
            partial.replace(final)
            for old in self.finished()[: -self.keep] if self.keep else []:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def finished(self) -> list[Path]:
        """The checkpoints, oldest first."""
        return sorted(self.folder.glob("checkpoint-*[0-9]"))

    def choose(self, wanted: str | None) -> Path | None:
        """The checkpoint that `--resume_from_checkpoint` names, or `None` to begin anew.

        Raises:
            ValueError: it does not exist.
        """
        if wanted in (None, "none"):
            return None
        if wanted == "latest":
            return self.finished()[-1] if self.finished() else None
        for path in (Path(wanted), self.folder / wanted):
            if (path / STATE_NAME).exists():
                return path
        raise ValueError(
            f"resume_from_checkpoint={wanted!r} is no checkpoint; there are: "
            f"{', '.join(path.name for path in self.finished()) or 'none'}."
        )

    def load(self, path: Path, fingerprint: dict[str, Any]) -> int:
        """Put everything back, and return the number of steps that were done.

        Raises:
            ValueError: the checkpoint is of a training with other options that decide its course.
        """
        state = json.loads((path / STATE_NAME).read_text())
        changed = [name for name, value in fingerprint.items() if state["fingerprint"].get(name) != value]
        if changed:
            old = {name: state["fingerprint"].get(name) for name in changed}
            raise ValueError(
                f"{path} is of a training with other options: {old}; go on with those, or choose another output_dir."
            )
        if self.ema is not None:
            self._set_weights(load_file(path / "ema.safetensors"))
            self._set_averages(state["ema_step"])
        self._set_weights(load_file(path / "weights.safetensors"))
        self._set_optimizer(load_file(path / "optimizer.safetensors"), state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if state["scaler"] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        return state["step"]

    def _inner_optimizer(self) -> torch.optim.Optimizer:
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def _set_weights(self, weights: dict[str, torch.Tensor]) -> None:
        options = StateDictOptions(full_state_dict=True, ignore_frozen_params=True, strict=False)
        result = set_model_state_dict(self.model, weights, options=options)
        if result.unexpected_keys:
            raise ValueError(f"The checkpoint holds weights that the model lacks: {result.unexpected_keys[:3]}.")

    def _set_optimizer(self, moments: dict[str, torch.Tensor], groups: list[dict[str, Any]]) -> None:
        states: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
        for place, tensor in moments.items():
            name, _, key = place.rpartition("/")
            states[name][key] = tensor
        options = StateDictOptions(full_state_dict=True, ignore_frozen_params=True)
        whole = {"state": dict(states), "param_groups": groups}
        set_optimizer_state_dict(self.model, self._inner_optimizer(), optim_state_dict=whole, options=options)

    def _averages(self) -> dict[str, torch.Tensor] | None:
        """Averaged weights by name; the average itself knows no names."""
        if self.ema is None:
            return None
        with averages_in_place(self.ema, self.model):
            averages = whole_state_dict(self.model, trainable_only=True)
            return {name: tensor.clone() for name, tensor in averages.items()}

    def _set_averages(self, optimization_step: int) -> None:
        """Take the model's present weights as the averages."""
        for average, parameter in zip(self.ema.shadow_params, learning_parameters(self.model), strict=True):
            average.copy_(parameter.detach())
        self.ema.optimization_step = optimization_step


def _ready(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
