"""Checkpoints without pickle: safetensors and JSON, whole, whatever the model was spread over.

Noise, noise levels, dropout and the order of clips follow from the seed and the step (see `trainer.py`), so there are
no random states to keep.
"""

from __future__ import annotations

import math
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from vsa_diffusers.directories import SavedDirectory, read_directory, replaced_directory
from vsa_diffusers.files import read_tensors

from .averages import averages_in_place, learning_parameters
from .checkpoint_checks import (
    Found,
    check_tensors,
    expected_groups,
    expected_moments,
    expected_weights,
    learning_names,
    parameter_names,
)
from .learning_rates import LearningRates, check_rates

STATE_NAME = "state.json"
WEIGHTS, AVERAGES, MOMENTS = "weights.safetensors", "ema.safetensors", "optimizer.safetensors"
_PREFIX = "checkpoint-"
_FORMAT = 2


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
        accelerator, model, optimizers: as prepared by accelerate.
        transformer: the model without what accelerate wrapped around it.
        rates: of the learning rates.
        ema: of the parameters that learn, or `None`.
        keep: number of checkpoints that stay, or `None` for all.
    """

    def __init__(
        self,
        folder: Path,
        accelerator: Accelerator,
        model: torch.nn.Module,
        transformer: torch.nn.Module,
        optimizers: Sequence[Any],
        rates: LearningRates,
        ema: EMAModel | None,
        keep: int | None,
    ):
        self.folder, self.accelerator, self.model, self.transformer = folder, accelerator, model, transformer
        self.optimizers = [getattr(each, "optimizer", each) for each in optimizers]
        self.rates, self.ema, self.keep = rates, ema, keep

    def save(self, step: int, fingerprint: dict[str, Any]) -> None:
        """Write `checkpoint-<step>`, in place of one of that step. At any moment the old or the new one is whole.

        Raises:
            OSError: it cannot be written.
        """
        weights = whole_state_dict(self.model, trainable_only=True)
        averages = self._averages()
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
        state = get_optimizer_state_dict(self.model, self.optimizers, options=options)
        if self.accelerator.is_main_process:
            moments = {f"{name}/{key}": value for name, each in state["state"].items() for key, value in each.items()}
            files = {WEIGHTS: weights, MOMENTS: moments} | ({} if averages is None else {AVERAGES: averages})
            scaler = self.accelerator.scaler
            facts = {
                "format": _FORMAT,
                "step": step,
                "fingerprint": fingerprint,
                "optimizer": expected_groups(self.transformer, self.optimizers),
                "without_moments": sorted(learning_names(self.transformer).keys() - state["state"].keys()),
                "learning_rates": self.rates.state(),
                "ema_step": self.ema.optimization_step if self.ema else None,
                "scaler": scaler.state_dict() if scaler is not None else None,
            }
            path = self.folder / f"{_PREFIX}{step:07d}"
            try:
                with replaced_directory(path, STATE_NAME, facts) as partial:
                    for name, tensors in files.items():
                        save_file(_ready(tensors), partial / name)
            except (OSError, SafetensorError) as error:
                raise OSError(f"{path} could not be written ({error}); {self._what_stays()}.") from error
            self._prune(path)
        self.accelerator.wait_for_everyone()

    def finished(self) -> list[Path]:
        """The checkpoints, oldest first, without those that were never written to the end."""
        return [path for path in self._folders() if (path / STATE_NAME).exists()]

    def later(self, path: Path) -> list[Path]:
        """The finished checkpoints of later steps; a training that went back replaces them."""
        return [other for other in self.finished() if path.parent == self.folder and _step_of(other) > _step_of(path)]

    def choose(self, wanted: str | None) -> Path | None:
        """The checkpoint that `--resume_from_checkpoint` names, or `None` to begin anew.

        Raises:
            ValueError: it does not exist, or beginning anew would mix two trainings.
        """
        finished = self.finished()
        if wanted in (None, "none"):
            if finished:
                raise ValueError(
                    f"resume_from_checkpoint=none begins anew, but {self.folder} holds {finished[-1].name} of an "
                    "earlier training; remove its checkpoints, or choose another output_dir."
                )
            return None
        if wanted == "latest":
            latest = finished[-1] if finished else None
            for path in self._folders():
                if path not in finished and (latest is None or _step_of(path) > _step_of(latest)):
                    self.accelerator.print(f"{path} was never written to the end ({STATE_NAME} is missing): skipped.")
            return latest
        for path in (Path(wanted), self.folder / wanted):
            if (path / STATE_NAME).exists():
                return path
        raise ValueError(
            f"resume_from_checkpoint={wanted!r} is no checkpoint; there are: "
            f"{', '.join(path.name for path in finished) or 'none'}."
        )

    def load(self, path: Path, fingerprint: dict[str, Any], defaults: Mapping[str, Any] | None = None) -> int:
        """Put everything back, and return the number of steps that were done. Nothing has changed after an error.

        Args:
            path: the checkpoint.
            fingerprint: what has to be the same.
            defaults: what a part of it had been in a checkpoint that does not name it: an option that came later.

        Raises:
            ValueError: the checkpoint is damaged, a mixture of several, or of a training with other options that decide
                its course.
        """
        files = {WEIGHTS, MOMENTS} | ({AVERAGES} if self.ema else set())

        self._check_course(path, SavedDirectory.read(path, STATE_NAME).facts, fingerprint, defaults or {})

        def read(saved: SavedDirectory) -> tuple[dict[str, Any], dict[str, dict[str, torch.Tensor]]]:
            facts = dict(saved.facts)
            self._check_state(path / STATE_NAME, facts)
            if set(saved.names) != files:
                raise ValueError(f"{path} holds {sorted(saved.names)}, where {sorted(files)} were expected.")
            tensors = {name: read_tensors(saved.file(name)) for name in sorted(files)}
            weights = expected_weights(self.transformer)
            for name in files - {MOMENTS}:
                check_tensors(path / name, weights, tensors[name])
            moments = expected_moments(self.transformer, self.optimizers, facts["without_moments"])
            check_tensors(path / MOMENTS, moments, tensors[MOMENTS])
            return facts, tensors

        try:
            facts, tensors = read_directory(path, STATE_NAME, read)
        except (ValueError, OSError) as error:
            raise ValueError(f"{error} {self._way_out(path)}") from error
        self._put_back(facts, tensors)
        return facts["step"]

    def _check_course(
        self, path: Path, facts: Mapping[str, Any], fingerprint: dict[str, Any], defaults: Mapping[str, Any]
    ) -> None:
        """Whether it is a checkpoint of this training, and not of a later step than asked for."""
        state = path / STATE_NAME
        found = Found(state, facts)
        if found.value("format", int) != _FORMAT:
            raise ValueError(f"{state} has format {facts['format']}, which this version cannot go on from.")
        old = {name: defaults[name] for name in fingerprint if name in defaults} | found.value("fingerprint", dict)
        changed = {
            name: old.get(name) for name in fingerprint.keys() | old.keys() if old.get(name) != fingerprint.get(name)
        }
        if changed:
            raise ValueError(
                f"{path} is of a training with other options: {changed}; go on with those, or "
                "choose another output_dir."
            )
        if found.value("step", int) < 1:
            raise ValueError(f"{state} has step={facts['step']}, which is no number of steps.")
        if self.rates.stretches[-1].total < facts["step"]:
            raise ValueError(
                f"{path} has {facts['step']} steps, more than max_train_steps={self.rates.stretches[-1].total}; ask "
                "for more, or go on from an earlier checkpoint."
            )

    def _check_state(self, state: Path, facts: Mapping[str, Any]) -> None:
        """Whether all that the state says can be put back."""
        found = Found(state, facts)
        found.equal("optimizer", expected_groups(self.transformer, self.optimizers))
        found.value("without_moments", list)
        try:
            check_rates(facts.get("learning_rates"))
        except ValueError as error:
            raise ValueError(f"{state}: {error}") from error
        if found.value("ema_step", int if self.ema else type(None)) is not None and facts["ema_step"] < 0:
            raise ValueError(f"{state} has ema_step={facts['ema_step']}, which is no number of steps.")
        scaler = self.accelerator.scaler
        own = scaler.state_dict() if scaler is not None else None
        saved = found.value("scaler", type(own))
        if own is not None and (saved.keys() != own.keys() or not all(map(_is_positive_number, saved.values()))):
            raise ValueError(f"{state} has scaler={saved}, which is no state of a gradient scaler like {own}.")

    def _put_back(self, facts: dict[str, Any], tensors: dict[str, dict[str, torch.Tensor]]) -> None:
        if self.ema is not None:
            self._set_weights(tensors[AVERAGES])
            self._set_averages(facts["ema_step"])
        self._set_weights(tensors[WEIGHTS])
        self._set_optimizers(tensors[MOMENTS])
        self.rates.load(facts["learning_rates"])
        if facts["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(facts["scaler"])

    def _folders(self) -> list[Path]:
        folders = (path for path in self.folder.glob(f"{_PREFIX}*") if path.is_dir())
        numbered = [path for path in folders if path.name.removeprefix(_PREFIX).isdecimal()]
        return sorted(numbered, key=_step_of)

    def _prune(self, newest: Path) -> None:
        """Remove what a training that went back has passed, and the oldest, but only what `save` wrote."""
        finished = self.finished()
        kept = [path for path in finished if _step_of(path) <= _step_of(newest)]
        old = kept[: -self.keep] if self.keep else []
        never_finished = [path for path in self._folders() if path not in finished]
        for path in (*self.later(newest), *old, *never_finished):
            # First of all, so that a kill leaves nothing that looks finished.
            (path / STATE_NAME).unlink(missing_ok=True)
            for name in (WEIGHTS, MOMENTS, AVERAGES):
                (path / name).unlink(missing_ok=True)
            for staging in path.glob(".saving-*"):
                shutil.rmtree(staging)
            if not any(path.iterdir()):
                path.rmdir()

    def _what_stays(self) -> str:
        finished = self.finished()
        return (
            f"{finished[-1].name} is whole, and the same command goes on from it" if finished else "there is no other"
        )

    def _way_out(self, path: Path) -> str:
        others = [other.name for other in self.finished() if other != path]
        return f"Other checkpoints to go on from: {', '.join(others)}." if others else "There is no other checkpoint."

    def _set_weights(self, weights: dict[str, torch.Tensor]) -> None:
        options = StateDictOptions(full_state_dict=True, ignore_frozen_params=True, strict=False)
        set_model_state_dict(self.model, dict(weights), options=options)

    def _set_optimizers(self, moments: dict[str, torch.Tensor]) -> None:
        states: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
        for place, tensor in moments.items():
            name, _, key = place.rpartition("/")
            states[name][key] = tensor
        # Not strict: what took no part in any step so far has no state.
        options = StateDictOptions(full_state_dict=True, ignore_frozen_params=True, strict=False)
        groups = [group | {"params": names} for _, group, names in parameter_names(self.transformer, self.optimizers)]
        whole = {"state": dict(states), "param_groups": groups}
        set_optimizer_state_dict(self.model, self.optimizers, optim_state_dict=whole, options=options)

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


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix(_PREFIX))


def _is_positive_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value >= 0
