"""What leaves modules as they were when it fails."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

_CONTAINERS = (dict, OrderedDict, list, set)


@contextmanager
def unchanged_on_error(
    *roots: torch.nn.Module, beside: Any = None
) -> Iterator[Callable[[Iterable[torch.Tensor]], None]]:
    """Undo, after any error in the block, what it did to these modules and to the attributes of `beside`.

    That is children, parameters, adapters and attributes. Hooks are left to whoever holds their handles.
    Yields a function to call with tensors before they are overwritten, which keeps copies of them on the CPU.
    """
    modules = {id(module): module for root in roots for module in root.modules()}.values()
    attributes = [(vars(each), dict(vars(each))) for each in (*modules, *([] if beside is None else [beside]))]
    containers = [
        (value, value.copy())
        for _, known in attributes
        for name, value in known.items()
        if type(value) in _CONTAINERS and "_hooks" not in name
    ]
    learns = [(parameter, parameter.requires_grad) for root in roots for parameter in root.parameters()]
    values: list[tuple[torch.Tensor, torch.Tensor]] = []

    def keep(tensors: Iterable[torch.Tensor]) -> None:
        for tensor in tensors:
            values.append((tensor, tensor.detach().to("cpu", copy=True)))

    try:
        yield keep
    except BaseException:
        for container, known in (*attributes, *containers):
            _restore(container, known)
        for parameter, learning in learns:
            parameter.requires_grad_(learning)
        with torch.no_grad():
            for tensor, value in values:
                tensor.copy_(value)
        raise


def _restore(container: Any, known: Any) -> None:
    if isinstance(container, list):
        container[:] = known
        return
    container.clear()
    container.update(known)
