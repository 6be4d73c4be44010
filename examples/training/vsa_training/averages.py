"""The parameters that learn, and their averages in their place for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers.training_utils import EMAModel
from torch.distributed.fsdp import FSDPModule


def learning_parameters(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """What learns; of a sharded model, the shards."""
    forget_gathered(model)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def forget_gathered(model: torch.nn.Module) -> None:
    """Have a sharded model gather its parameters again before it uses them.

    After a forward pass without gradients, FSDP keeps the root's parameters gathered for the backward pass, which does
    not come. The next pass would run with those, whatever has become of the shards.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def averages_in_place(ema: EMAModel | None, model: torch.nn.Module) -> Iterator[None]:
    """What learns holds its averages inside; nothing happens without an average.

    `EMAModel.store` would do, but it takes sharded parameters apart.
    """
    if ema is None:
        yield
        return
    parameters = learning_parameters(model)
    own = [parameter.detach().clone() for parameter in parameters]
    ema.copy_to(parameters)
    try:
        yield
    finally:
        forget_gathered(model)
        with torch.no_grad():
            for parameter, value in zip(parameters, own, strict=True):
                parameter.copy_(value)
