"""Measure whole transformers on one GPU and spread over several: time, equality, and what the exchange takes.

    torchrun --nproc-per-node 2 -m vsa_diffusers.bench.scaling --json scaling.json
    torchrun --nproc-per-node 2 -m vsa_diffusers.bench.scaling --models wan14b-720p --ratio 0.1

Weights are random and the same on every rank. Each rank first runs the whole transformer by itself, then its part of it
with all others. A time is that of one forward; the slowest rank counts, and the JSON has all ranks'.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from .. import VSAConfig, cp_plan, disable_guidance_parallel, disable_vsa, enable_guidance_parallel, enable_vsa
from ..models import require_family
from ..parallel import exchange_of
from ..processor import FamilyAttnProcessor
from . import report
from .full_size import FULL_SIZES, FullSize
from .transformers import BACKENDS, _time, shallow

COLUMNS = ("model", "what", "GPUs", "seconds", "x one", "attention", "exchange", "copies", "error", "peak GB")
PARTS = ("attention", "to_heads", "to_tokens", "exchange")


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Parse `argv`, measure, print on the first rank; returns the rows."""
    args = _parser().parse_args(argv)
    device = "cuda" if torch.cuda.is_available() and not args.tiny else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    own_group = not dist.is_initialized()
    if own_group:
        dist.init_process_group()
    rows: list[dict[str, Any]] = []
    machine = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "ranks": dist.get_world_size(),
        "torch": torch.__version__,
    }
    for name in args.models:
        for row in measure_model(FULL_SIZES[name], device, args):
            rows.append(row)
            if dist.get_rank() == 0:
                print(" | ".join(cells(row)), flush=True)
                if args.json is not None:
                    args.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    if dist.get_rank() == 0:
        report.print_lines(COLUMNS, [cells(row) for row in rows], f"one forward on {machine['device']}", left=2)
    if own_group:
        dist.destroy_process_group()
    return rows


def measure_model(size: FullSize, device: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows of one transformer: alone, dense and sparse; then over all ranks; then guidance over two groups."""
    from diffusers import ContextParallelConfig

    ranks = dist.get_world_size()
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    model = size.build(device, dtype, args.tiny)
    inputs = size.make_inputs(model.config, device, dtype, args.tiny)
    config = VSAConfig(args.ratio, combine=args.combine, block_size=args.block_size)

    def forward() -> torch.Tensor:
        return model(**inputs, return_dict=False)[0]

    def row(what: str, gpus: int, alone: dict[str, Any] | None = None, run: Any = None) -> dict[str, Any]:
        measured, output = measure(model, run or forward, device, args.runs)
        told: list[Any] = [None] * ranks
        dist.all_gather_object(told, measured)
        seconds = max(each["seconds"] for each in told)
        found = {
            "model": size.name, "video_shape": size.video_shape(args.tiny), "what": what, "gpus": gpus,
            "seconds": seconds, "ranks": told, "output": output,
        }  # fmt: skip
        if alone is not None:
            found["speedup"] = alone["seconds"] / seconds
            found["error"] = _error(output, alone["output"])
            found["alone"] = {part: alone["ranks"][0].get(part) for part in PARTS}
        return found

    with torch.no_grad(), BACKENDS["cudnn" if device == "cuda" else "default"]():
        dense = row("dense", 1)
        yield _without_output(dense)
        enable_vsa(model, config=config)
        sparse = row(f"{args.combine} {args.ratio:g}", 1)
        yield _without_output(sparse)
        if args.guidance and ranks == 2 and size.cls.startswith("Wan"):
            yield _without_output(_guidance(model, inputs, sparse, row))
        model.enable_parallelism(
            config=ContextParallelConfig(ulysses_degree=ranks, ulysses_anything=args.uneven), cp_plan=cp_plan(model)
        )
        yield _without_output(row(sparse["what"], ranks, sparse))
        disable_vsa(model)
        yield _without_output(row("dense", ranks, dense))


def measure(
    model: torch.nn.Module, forward: Callable[[], torch.Tensor], device: str, runs: int
) -> tuple[dict[str, Any], torch.Tensor]:
    """Seconds of one forward and of the parts of its attention in all layers, and its output.

    The first blocks run before, so that kernels are compiled; of slow forwards one is timed, else the fastest of
    `runs`.
    """
    with shallow(model):
        forward()
    require_family(model).prepare(model)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    best: dict[str, Any] = {}
    outputs: list[torch.Tensor] = []

    def keep() -> torch.Tensor:
        outputs[:] = [forward()]
        return outputs[0]

    for _ in range(runs):
        dist.barrier()
        with _parts(model, device) as parts:
            seconds = _time(keep, device)
        if not best or seconds < best["seconds"]:
            best = {"seconds": seconds, **{name: sum(each() for each in spans) for name, spans in parts.items()}}
        slow = torch.tensor(int(seconds > 3), device=device)
        dist.all_reduce(slow, dist.ReduceOp.MAX)
        if slow:
            break
    if device == "cuda":
        best["peak_bytes"] = torch.cuda.max_memory_allocated()
    return best, outputs[0]


@contextmanager
def _parts(model: torch.nn.Module, device: str) -> Iterator[dict[str, list[Callable[[], float]]]]:
    """While inside, the calls of attention and of the exchange are timed, waiting for other ranks included."""
    spans: dict[str, list[Callable[[], float]]] = {}
    timed: list[tuple[Any, str]] = []

    def time_calls(owner: Any, method: str, name: str) -> None:
        function = getattr(owner, method)

        def call(*args: Any, **kwargs: Any) -> Any:
            start, end = _mark(device), None
            result = function(*args, **kwargs)
            end = _mark(device)
            spans.setdefault(name, []).append(lambda: _between(start, end))
            return result

        setattr(owner, method, call)
        timed.append((owner, method))

    for module in model.modules():
        processor = getattr(module, "processor", None)
        if isinstance(processor, FamilyAttnProcessor):
            time_calls(processor, "attend", "attention")
    exchange = exchange_of(getattr(model, "_parallel_config", None))
    if exchange is not None:
        time_calls(exchange, "to_heads", "to_heads")
        time_calls(exchange, "to_tokens", "to_tokens")
        time_calls(exchange, "_all_to_all", "exchange")
    try:
        yield spans
    finally:
        for owner, method in timed:
            delattr(owner, method)


def _mark(device: str) -> Any:
    if device == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(start: Any, end: Any) -> float:
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1e3


def _guidance(model: torch.nn.Module, inputs: dict[str, Any], sparse: dict[str, Any], row: Any) -> dict[str, Any]:
    """Both predictions of a step, one on each GPU: to be compared with twice the time of one GPU's forward."""
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

    pipe = WanPipeline(None, None, None, FlowMatchEulerDiscreteScheduler(), model)
    pipe._guidance_scale = 5.0
    enable_guidance_parallel(pipe)

    def step() -> torch.Tensor:
        first = model(**inputs, return_dict=False)[0]
        model(**inputs, return_dict=False)
        return first

    try:
        return row("guidance " + sparse["what"], 2, {**sparse, "seconds": 2 * sparse["seconds"]}, step)
    finally:
        disable_guidance_parallel(pipe)


def _error(output: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm."""
    difference = torch.linalg.vector_norm(output.float() - expected.float())
    return float(difference / torch.linalg.vector_norm(expected.float()))


def _without_output(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "output"}


def cells(row: dict[str, Any]) -> list[str]:
    """One result as the table shows it, in milliseconds for parts; what was not measured stays empty."""
    slowest = max(row["ranks"], key=lambda each: each["seconds"])
    exchange = slowest.get("exchange")
    copies = None if exchange is None else slowest["to_heads"] + slowest["to_tokens"] - exchange
    peak = slowest.get("peak_bytes")

    def number(value: float | None, form: str, factor: float = 1) -> str:
        return "" if value is None else format(value * factor, form)

    return [
        row["model"],
        row["what"],
        str(row["gpus"]),
        f"{row['seconds']:.3f}",
        number(row.get("speedup"), ".2f"),
        number(slowest.get("attention"), ".1f", 1e3),
        number(exchange, ".1f", 1e3),
        number(copies, ".1f", 1e3),
        number(row.get("error"), ".1e"),
        number(peak, ".1f", 1e-9),
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="torchrun -m vsa_diffusers.bench.scaling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    models = ["wan1.3b-480p", "wan14b-720p", "hunyuan-720p"]
    parser.add_argument("--models", nargs="+", default=models, choices=list(FULL_SIZES), metavar="MODEL")
    parser.add_argument("--ratio", type=float, default=0.2, help="top_k_ratio")
    parser.add_argument("--combine", default="merge", choices=["merge", "sparse", "sum"])
    parser.add_argument("--block-size", default="auto", type=_block_size, help='"auto", or as in 4,4,4')
    parser.add_argument("--runs", type=int, default=3, help="forwards that are timed, where they are quick")
    parser.add_argument("--uneven", action="store_true", help="tokens need not divide by the number of ranks")
    parser.add_argument("--no-guidance", dest="guidance", action="store_false", help="leave guidance out")
    parser.add_argument("--tiny", action="store_true", help="small models of the same make, on the CPU")
    parser.add_argument("--json", type=Path, help="write all rows to this file")
    return parser


def _block_size(text: str) -> str | tuple[int, ...]:
    return text if text == "auto" else tuple(map(int, text.split(",")))


if __name__ == "__main__":
    main()
