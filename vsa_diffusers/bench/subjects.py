"""What is measured: dense attention, this package, and fastvideo-kernel where it is installed."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..attention import video_sparse_attention
from .shapes import Shape

Call = Callable[[], torch.Tensor]
DENSE = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


def dense(inputs: list[torch.Tensor], device: str) -> Iterator[tuple[str, Call]]:
    """Built-in dense attention, one backend at a time."""
    for name in ("flash",) if device == "cpu" else ("flash", "cudnn"):

        def call(backend=DENSE[name]):
            with sdpa_kernel(backend):
                q, k, v = (x.transpose(1, 2) for x in inputs[:3])
                return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

        yield f"dense {name}", call


def ours(
    inputs: list[torch.Tensor],
    shape: Shape,
    ratio: float,
    combine: str,
    implementation: str,
    block_size=(4, 4, 4),
    selection: str = "mean",
) -> Call:
    """One call of `video_sparse_attention`."""
    query, key, value, gate = inputs

    def call():
        return video_sparse_attention(
            query,
            key,
            value,
            shape.video_shape,
            top_k_ratio=ratio,
            block_size=block_size,
            combine=combine,
            gate=gate if combine == "gate" else None,
            selection=selection,
            implementation=implementation,
        )

    return call


def has_peer() -> bool:
    return importlib.util.find_spec("fastvideo_kernel") is not None


class Peer:
    """fastvideo-kernel behind the gathers into padded tile order, and back, of its users."""

    def __init__(self, shape: Shape, device: str):
        from fastvideo_kernel import video_sparse_attn

        self.attend = video_sparse_attn
        grid = [math.ceil(extent / 4) for extent in shape.video_shape]
        self.tiles = math.prod(grid)
        index = torch.arange(shape.tokens, device=device).reshape(shape.video_shape)
        T, H, W = shape.video_shape
        padded = F.pad(index, (0, -W % 4, 0, -H % 4, 0, -T % 4), value=-1)
        order = padded.reshape(grid[0], 4, grid[1], 4, grid[2], 4).permute(0, 2, 4, 1, 3, 5).reshape(self.tiles, 64)
        self.sizes = (order >= 0).sum(1)
        valid = order.flatten() >= 0
        self.tokens = order.flatten()[valid]
        self.slots = torch.arange(order.numel(), device=device)[valid]
        self.back = self.slots[torch.argsort(self.tokens)]

    def __call__(self, inputs: list[torch.Tensor], ratio: float) -> torch.Tensor:
        q, k, v, gate = (self._tile(x) for x in inputs)
        top_k = max(1, math.ceil(ratio * self.tiles - 1e-9))
        out = self.attend(q, k, v, self.sizes, self.sizes, top_k, block_size=(4, 4, 4), compress_attn_weight=gate)
        return out.transpose(1, 2)[:, self.back]

    def _tile(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(x.shape[0], self.tiles * 64, *x.shape[2:], device=x.device, dtype=x.dtype)
        out[:, self.slots] = x[:, self.tokens]
        return out.transpose(1, 2).contiguous()
