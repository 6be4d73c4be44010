"""Time, memory, launches and processor time of one call."""

from __future__ import annotations

import datetime
import importlib.metadata
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

LONG_MS = 50.0  # on a GPU, longer calls have one round: no one moment of its clock decides for them
CPU_LONG_MS = 5000.0


@dataclass
class Measurement:
    """Medians, and `first_ms`: what the first call took, with whatever had to be compiled or tuned for it.

    `ms` is the median of the `rounds`, which are medians themselves, some time apart: GPUs change their clock.

    `launches`, `cpu_us`, `extra_bytes` and `kernels` (microseconds by name) are known on GPUs only.
    """

    ms: float
    first_ms: float
    rounds: list[float] = field(default_factory=list)
    launches: int | None = None
    cpu_us: float | None = None
    extra_bytes: int | None = None
    kernels: dict[str, float] = field(default_factory=dict)

    @property
    def spread(self) -> float:
        """From the shortest round to the longest, as a share of `ms`."""
        return (max(self.rounds) - min(self.rounds)) / self.ms if self.rounds else 0.0


def this_device() -> str:
    """Where measurements run: "cuda" if there is a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def machine(device: str) -> dict[str, str]:
    """What measurements on "cuda" or "cpu" are of, and when they were made."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "date": datetime.date.today().isoformat(),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def measure(call: Callable[[], object], device: str, rep_ms: int = 100) -> Measurement:
    """Measure `call` after it has run twice. Extra memory is what it needs beyond what it returns.

    On a CPU, where nothing is compiled, a call that takes seconds is measured once.
    """
    first_ms = _wall_ms(call, device)
    if device == "cpu" and first_ms > CPU_LONG_MS:
        return Measurement(first_ms, first_ms, [first_ms])
    call()
    if device == "cpu":
        rounds = [_wall_ms(call, device) for _ in range(3)]
        return Measurement(statistics.median(rounds), first_ms, rounds)
    rounds = [time_ms(call, rep_ms)]
    again = rounds[0] < LONG_MS
    extra_bytes = _extra_bytes(call)
    if again:
        rounds.append(time_ms(call, rep_ms))
    cpu_us = _cpu_us(call, max(1, min(10, int(20 / rounds[0]))))
    kernels = _kernels(call)
    if again:
        rounds.append(time_ms(call, rep_ms))
    launches = int(kernels.pop("launches"))
    return Measurement(statistics.median(rounds), first_ms, rounds, launches, cpu_us, extra_bytes, kernels)


def _wall_ms(call: Callable[[], object], device: str) -> float:
    """How long one call keeps its caller waiting."""
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device != "cpu":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def time_ms(call: Callable[[], object], rep_ms: int = 100) -> float:
    """Median milliseconds on the GPU, the L2 cache cleared between calls."""
    from triton.testing import do_bench

    return do_bench(call, warmup=rep_ms // 4, rep=rep_ms, return_mode="median")


def _extra_bytes(call: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    kept = torch.cuda.memory_allocated() - before
    del result
    return peak - before - kept


def _cpu_us(call: Callable[[], object], calls: int) -> float:
    """Time to enqueue a call, the least of three runs of `calls` with an empty queue."""
    runs = []
    for _ in range(3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        runs.append((time.perf_counter() - start) / calls)
        torch.cuda.synchronize()
    return 1e6 * min(runs)


def _kernels(call: Callable[[], object]) -> dict[str, float]:
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    events = [event for event in profiler.events() if event.device_type == DeviceType.CUDA]
    kernels: dict[str, float] = {"launches": len(events)}
    for event in events:
        kernels[event.name] = kernels.get(event.name, 0.0) + event.device_time_total
    return kernels
