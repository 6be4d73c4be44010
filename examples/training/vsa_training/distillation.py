"""The dense model as the teacher of the sparse one: its output is matched, and if asked for each layer's attention."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from vsa_diffusers.pipeline import sparse_processors


def dense_teacher(transformer: torch.nn.Module) -> torch.nn.Module:
    """The model as it is before VSA, gates and a LoRA: with modules of its own, but the very same parameters."""
    shared: dict[int, Any] = {id(parameter): parameter for parameter in transformer.parameters()}
    return copy.deepcopy(transformer, shared).eval()


def keep_apart(teacher: torch.nn.Module, everything: bool = False) -> int:
    """Give the teacher frozen copies of those parameters that learn in the student; call it once those are chosen.

    Args:
        teacher: as `dense_teacher` made it, still sharing its parameters.
        everything: copy what is frozen, too, as a model needs that is spread over processes.

    Returns:
        The number of values that are now held twice.
    """
    copies: dict[int, torch.nn.Parameter] = {}
    for module in teacher.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad or everything:
                if id(parameter) not in copies:
                    copies[id(parameter)] = torch.nn.Parameter(parameter.detach().clone(), requires_grad=False)
                setattr(module, name, copies[id(parameter)])
    return sum(each.numel() for each in copies.values())


def sparse_layers(transformer: torch.nn.Module) -> list[str]:
    """Names of the attention modules that are sparse, where VSA is enabled."""
    return [name for name, processor in sparse_processors(transformer).items() if not processor.stays_dense]


class Distillation:
    """Losses of a sparse student against its dense teacher. A training that ends leaves hooks on both.

    Args:
        teacher: the dense model, frozen.
        student: the model that is trained, without wrappers, on which VSA is enabled.
        attention_weight: of the attention outputs' error; 0 leaves that out, and stores no outputs.
    """

    def __init__(self, teacher: torch.nn.Module, student: torch.nn.Module, attention_weight: float = 0.0):
        self.teacher, self.attention_weight = teacher, attention_weight
        names = sparse_layers(student) if attention_weight else []
        self._expected = _AttentionOutputs({name: teacher.get_submodule(name) for name in names})
        self._found = _AttentionOutputs({name: student.get_submodule(name) for name in names})

    def losses(
        self, model: torch.nn.Module, predict: Callable[[torch.nn.Module], torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """The `loss` to minimise, and what it is made of where that is more than one thing.

        `output_loss` is the mean squared difference of the predictions, in the unit of the diffusion loss.
        `attention_loss` is the mean over the sparse layers of the squared difference of their outputs, relative to the
        teacher's mean square.

        Args:
            model: the student, with all its wrappers.
            predict: calls the model that it is given, always with the same inputs.
        """
        with torch.no_grad(), self._expected.kept() as expected:
            target = predict(self.teacher)
        with self._found.kept() as found:
            prediction = predict(model)
        output = (prediction.float() - target.float()).square().mean()
        if not self.attention_weight:
            return {"loss": output}
        errors = [_relative_error(found[name], expected[name]) for name in expected]
        attention = torch.stack(errors).mean()
        loss = output + self.attention_weight * attention
        return {"loss": loss, "output_loss": output, "attention_loss": attention}


class _AttentionOutputs:
    """Keeps what modules return while asked to; not when checkpointed blocks run anew in the backward pass."""

    def __init__(self, modules: Mapping[str, torch.nn.Module]):
        self._outputs: dict[str, torch.Tensor] | None = None
        for name, module in modules.items():
            module.register_forward_hook(self._hook(name))

    @contextmanager
    def kept(self) -> Iterator[dict[str, torch.Tensor]]:
        self._outputs = outputs = {}
        try:
            yield outputs
        finally:
            self._outputs = None

    def _hook(self, name: str) -> Callable[..., None]:
        def keep(module: torch.nn.Module, arguments: Any, output: Any) -> None:
            if self._outputs is not None:
                # The video's stream comes first where there are several.
                self._outputs[name] = output if isinstance(output, torch.Tensor) else output[0]

        return keep


def _relative_error(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    found, expected = found.float(), expected.float()
    return (found - expected).square().mean() / expected.square().mean().clamp_min(1e-12)
