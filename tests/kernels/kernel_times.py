"""Microseconds that each kernel of a call takes on this GPU, under the profiler.

    PYTHONPATH=CHECKOUT python tests/kernels/kernel_times.py --shapes cogvideox-480p --selections mean quarters --json F

CHECKOUT is a folder that holds `vsa_diffusers/`, and perhaps a Triton of its own, `triton/`. Several processes may run
beside one another with the same `--lock`: they compile at the same time, and measure in turns.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import itertools
import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from torch.profiler import ProfilerActivity, profile

from vsa_diffusers import video_sparse_attention
from vsa_diffusers.bench.shapes import SHAPES, parse

WARM_UP = 3
CALLS = 15  # under one profile


def call_of(shape: str, combine: str, selection: str, ratio: float) -> Callable[[], torch.Tensor]:
    """A call on random inputs, the same in each process."""
    torch.manual_seed(0)
    layer = parse(shape)
    query, key, value, gate = layer.inputs("cuda", torch.bfloat16)
    return lambda: video_sparse_attention(
        query,
        key,
        value,
        layer.video_shape,
        top_k_ratio=ratio,
        gate=gate if combine == "gate" else None,
        combine=combine,
        selection=selection,
    )


def profiled(call: Callable[[], torch.Tensor]) -> dict[str, float]:
    """Microseconds of each kernel a call."""
    for _ in range(WARM_UP):
        call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as told:
        for _ in range(CALLS):
            call()
        torch.cuda.synchronize()
    return {
        each.key: each.self_device_time_total / CALLS for each in told.key_averages() if each.self_device_time_total
    }


@contextlib.contextmanager
def alone(lock: Path | None) -> Iterator[None]:
    """While no other process holds the lock."""
    if lock is None:
        yield
        return
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES))
    parser.add_argument("--combines", nargs="+", default=["gate", "merge"])
    parser.add_argument("--selections", nargs="+", default=["mean"])
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.1])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--lock", type=Path, help="a file that all processes on this GPU share")
    parser.add_argument("--json", type=Path, help="where to write the microseconds of every turn")
    arguments = parser.parse_args()
    cases = list(itertools.product(arguments.shapes, arguments.combines, arguments.selections, arguments.ratios))
    for case in cases:
        call_of(*case)()  # compiles
        torch.cuda.empty_cache()
    times: dict[Any, list[float]] = defaultdict(list)
    for _, case in itertools.product(range(arguments.turns), cases):
        with alone(arguments.lock):
            for kernel, us in profiled(call_of(*case)).items():
                times[(*case, kernel)].append(us)
            torch.cuda.empty_cache()
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, Triton {triton.__version__}\n")
    print("| shape | combine | selection | ratio | kernel | µs | least to greatest |\n|---|---|---|---|---|---|---|")
    for (*case, kernel), us in times.items():
        print("|", *(f"{cell} |" for cell in case), f"{kernel[:40]} |", f"{statistics.median(us):.1f} |", end=" ")
        print(f"{min(us):.1f} to {max(us):.1f} |")
    if arguments.json:
        names = ("shape", "combine", "selection", "ratio", "kernel")
        rows = [{**dict(zip(names, key, strict=True)), "us": us} for key, us in times.items()]
        arguments.json.write_text(json.dumps({"triton": triton.__version__, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
