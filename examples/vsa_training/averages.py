"""Averaged weights in the place of the weights, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers.training_utils import EMAModel


@contextmanager
def averages_in_place(ema: EMAModel | None, parameters: list[torch.nn.Parameter]) -> Iterator[None]:
    """The parameters hold their averages inside; nothing happens without an average.

    `EMAModel.store` would do, but it takes sharded parameters apart.
    """
    if ema is None:
        yield
        return
    own = [parameter.detach().clone() for parameter in parameters]
    ema.copy_to(parameters)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, own, strict=True):
                parameter.copy_(value)
