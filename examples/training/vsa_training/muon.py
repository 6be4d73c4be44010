"""Muon, the optimiser of the tiny Wan model and of the training recipe; also for sharded parameters."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate

# Matrices that are orthogonalised at once have at most so many values together.
AT_ONCE = 2**27


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised updates (Jordan et al. 2024), in AdamW's step size (Liu et al., arXiv 2502.16982).

    For weights of two or more dimensions. It needs roughly half of AdamW's steps, and here steps are what is scarce.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update; a closure is not supported."""
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for param in group["params"]:
                if param.grad is not None:
                    by_shape[param.shape, param.dtype].append(param)
            for params in by_shape.values():
                count = max(1, AT_ONCE // params[0].numel())
                for first in range(0, len(params), count):
                    self._step_equal_shapes(params[first : first + count], group)

    def _step_equal_shapes(self, params: list[nn.Parameter], group: dict) -> None:
        for param in params:
            if not self.state[param]:
                self.state[param]["momentum"] = torch.zeros_like(param)
        momenta = [_own_part(self.state[param]["momentum"]) for param in params]
        grads = [_own_part(param.grad) for param in params]
        torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
        updates = torch._foreach_lerp(grads, momenta, group["momentum"])
        whole = [_whole(update, param) for update, param in zip(updates, params, strict=True)]
        stacked = torch.stack(whole).flatten(2)
        stacked = orthogonalise(stacked) * (0.2 * max(stacked.shape[1:]) ** 0.5)
        own = [
            _part_of(update.view(param.shape).to(param.dtype), param)
            for update, param in zip(stacked, params, strict=True)
        ]
        parts = [_own_part(param) for param in params]
        torch._foreach_mul_(parts, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(parts, own, alpha=-group["lr"])


def _own_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _whole(part: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The whole tensor of which this process holds a part, spread as `like` is."""
    if not isinstance(like, DTensor):
        return part
    spread = DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return spread.full_tensor()


def _part_of(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor that every process holds."""
    if not isinstance(like, DTensor):
        return whole
    everywhere = [Replicate()] * like.device_mesh.ndim
    return (
        DTensor.from_local(whole, like.device_mesh, everywhere, run_check=False)
        .redistribute(placements=like.placements)
        .to_local()
    )


def orthogonalise(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Newton-Schulz iteration towards the nearest (semi-)orthogonal matrix, `[n, rows, columns]`."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    transposed = x.shape[1] > x.shape[2]
    if transposed:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if transposed else x
