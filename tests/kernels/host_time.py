"""What the host does for a call, without a GPU: kernels are compiled for Hopper, launches end at a stub driver.

    PYTHONPATH=. python tests/kernels/host_time.py

Launching for real adds a few microseconds each, and so does CUDA's memory; the processor counts most.
"""

import statistics
import time
from collections.abc import Callable
from unittest import mock

import torch

from stub_driver import hopper_stub
from vsa_diffusers import video_sparse_attention
from vsa_diffusers.kernels import launch

VIDEO_SHAPE, HEADS, HEAD_DIM = (16, 16, 24), 32, 128  # LTX-2 at 512x768
CALLS = 200


def microseconds(call: Callable[[], object]) -> float:
    """Median of seven rounds, per call."""
    rounds = []
    for _ in range(7):
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        rounds.append((time.perf_counter() - start) / CALLS * 1e6)
    return statistics.median(rounds)


def _no(query):
    return False


def main() -> None:
    shape = (1, VIDEO_SHAPE[0] * VIDEO_SHAPE[1] * VIDEO_SHAPE[2], HEADS, HEAD_DIM)
    query, key, value, gate, grad = (torch.empty(shape, dtype=torch.bfloat16).requires_grad_() for _ in range(5))

    def forward():
        return video_sparse_attention(query, key, value, VIDEO_SHAPE, top_k_ratio=0.1, gate=gate)

    def forward_without_gradients():
        with torch.no_grad():
            forward()

    def both():
        torch.autograd.grad(forward(), (query, key, value, gate), grad)

    with hopper_stub() as driver:
        for name, call in (("forward", forward_without_gradients), ("forward and backward", both)):
            start = time.perf_counter()
            call()
            first = time.perf_counter() - start
            call()
            driver.launches.clear()
            call()
            count, again = len(driver.launches), microseconds(call)
            with mock.patch.object(launch, "may_replay", _no):
                anew = microseconds(call)
            print(f"{name}: {count} launches; {again:.0f} us, launched anew {anew:.0f} us; first call {first:.1f} s")


if __name__ == "__main__":
    main()
