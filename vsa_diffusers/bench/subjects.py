"""What is measured: dense attention and this package; `peers.py` has what others make."""

from __future__ import annotations

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
