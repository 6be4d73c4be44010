"""What every training stage needs: an optimiser, averaged weights, a time budget, and checkpoints without pickle."""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from safetensors.torch import save_file
from torch import nn
from vsa_training.checkpoint_checks import check_tensors
from vsa_training.muon import Muon

from vsa_diffusers.files import opened_tensors, read_tensors, replaced_file

STATE_NAME = "state.safetensors"


class Optimizers:
    """Muon for the matrices inside the network, AdamW for everything else, one learning rate for both."""

    def __init__(self, module: nn.Module, lr: float, adamw_only: tuple[str, ...] = ()):
        inner, outer = [], []
        for name, param in module.named_parameters():
            is_inner = param.ndim >= 2 and min(param.shape[:2]) > 1 and not any(part in name for part in adamw_only)
            (inner if is_inner else outer).append(param)
        self.lr = lr
        self.parts = [Muon(inner, lr=lr), torch.optim.AdamW(outer, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)]

    def step(self, scale: float) -> None:
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = self.lr * scale
            part.step()
            part.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {
            f"optimizer.{index}.{param}.{name}": value
            for index, part in enumerate(self.parts)
            for param, state in part.state_dict()["state"].items()
            for name, value in state.items()
        }

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        states = [defaultdict(dict) for _ in self.parts]
        for key, value in tensors.items():
            if key.startswith("optimizer."):
                _, index, param, name = key.split(".")
                states[int(index)][int(param)][name] = value
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict({**part.state_dict(), "state": dict(state)})


class AveragedWeights:
    """Average over about the last tenth of all steps so far, however many there are (arXiv 2312.02696, section 3)."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.values = {name: param.detach().clone() for name, param in module.named_parameters()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        params = [param.detach() for param in self.module.parameters()]
        torch._foreach_lerp_(list(self.values.values()), params, min(1.0, 10.0 / (step + 10)))

    @torch.no_grad()
    def copy_to_module(self) -> None:
        for name, param in self.module.named_parameters():
            param.copy_(self.values[name])


class TrainingRun:
    """Weights, their average, optimiser state and the time spent, resumable from `folder`.

    The learning rate follows the share of `minutes` that is spent: a short warm-up, then a cosine down to zero.
    `call_minutes` ends one call early; the next goes on from the checkpoint as if nothing had happened.
    """

    def __init__(
        self,
        folder: Path,
        module: nn.Module,
        lr: float,
        minutes: float,
        call_minutes: float | None = None,
        adamw_only: tuple[str, ...] = (),
        save_every: float = 120.0,
    ):
        self.folder, self.module, self.minutes = folder, module, minutes
        self.optimizers = Optimizers(module, lr, adamw_only)
        self.average = AveragedWeights(module)
        self.step, self.spent = 0, 0.0
        self.call_seconds = math.inf if call_minutes is None else 60 * call_minutes
        self.save_every = save_every
        if (folder / STATE_NAME).exists():
            self._load()
        self.started_at = self.last_tick = self.last_save = time.monotonic()

    @property
    def progress(self) -> float:
        """Share of the whole budget that is spent, 0 to 1."""
        return min(1.0, self.spent / (60 * self.minutes))

    @property
    def finished(self) -> bool:
        return self.progress >= 1.0

    @property
    def out_of_time(self) -> bool:
        return self.finished or time.monotonic() - self.started_at >= self.call_seconds

    def update(self, max_norm: float = 1.0) -> None:
        """Apply the gradients, and save from time to time."""
        nn.utils.clip_grad_norm_(self.module.parameters(), max_norm)
        warmup = min(1.0, (self.step + 1) / 50)
        self.optimizers.step(warmup * (0.5 + 0.5 * math.cos(math.pi * self.progress)))
        self.step += 1
        self.average.update(self.step)
        now = time.monotonic()
        self.spent += now - self.last_tick
        self.last_tick = now
        if now - self.last_save > self.save_every:
            self.save()

    def save(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"module.{name}": value.detach() for name, value in self.module.named_parameters()}
        tensors |= {f"average.{name}": value for name, value in self.average.values.items()}
        tensors |= self.optimizers.tensors()
        # In one file, so that weights never meet another save's step.
        state = {"step": str(self.step), "spent_seconds": f"{self.spent:.1f}"}
        with replaced_file(self.folder / STATE_NAME) as partial:
            save_file({name: value.contiguous().cpu() for name, value in tensors.items()}, partial, metadata=state)
        self.last_save = self.last_tick = time.monotonic()

    def _load(self) -> None:
        path = self.folder / STATE_NAME
        with opened_tensors(path) as file:
            state = file.metadata() or {}
        tensors = read_tensors(path)
        expected = {
            f"{kind}.{name}": (tuple(param.shape), param.dtype)
            for name, param in self.module.named_parameters()
            for kind in ("module", "average")
        }
        found = {name: tensor for name, tensor in tensors.items() if not name.startswith("optimizer.")}
        check_tensors(path, expected, found)
        if not {"step", "spent_seconds"} <= state.keys():
            raise ValueError(f"{path} does not say how far it is; remove it, and begin anew.")
        with torch.no_grad():
            for name, param in self.module.named_parameters():
                param.copy_(tensors[f"module.{name}"])
                self.average.values[name].copy_(tensors[f"average.{name}"])
        self.optimizers.load(tensors)
        self.step, self.spent = int(state["step"]), float(state["spent_seconds"])


def autocast(device: torch.device) -> torch.autocast:
    """bf16 where the hardware has it."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")


@contextmanager
def progress_bar(title: str, run: TrainingRun) -> Iterator[Callable[..., None]]:
    """Yields `report(**losses)`, which keeps running means of the losses and shows them every ten seconds."""
    means: dict[str, torch.Tensor] = {}
    console = Console()
    last_line = time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}"))
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(title, total=1.0, text="")

        def report(**losses: torch.Tensor) -> None:
            nonlocal last_line
            for name, value in losses.items():
                means[name] = torch.lerp(means.get(name, value), value, 0.02)
            if time.monotonic() - last_line < 10:
                return
            last_line = time.monotonic()
            text = ", ".join(f"{name} {value.item():.4f}" for name, value in means.items())
            text = f"step {run.step}, {run.spent / 60:.1f} of {run.minutes:g} min, {text}"
            progress.update(task, completed=run.progress, text=text)
            if not console.is_terminal:
                console.print(f"{title}: {text}")

        yield report
