"""Measure whole transformers of published models: one forward, dense against sparse.

    python -m vsa_diffusers.bench.transformers --json transformers.json
    python -m vsa_diffusers.bench.transformers --models wan1.3b-480p --ratio 0.1
    python -m vsa_diffusers.bench.transformers --compile  # the blocks, of the dense and the sparse model alike
    python -m vsa_diffusers.bench.transformers --tiny     # the same steps on small models, on any machine

Weights are random, so nothing is downloaded. The ratio is constant, and blocks are what `enable_vsa` takes unless
--block-size is given. Dense attention runs with PyTorch's default backend and with cuDNN
preferred; both are timed on the first block of each kind, and the faster one then serves the whole model, sparse too
(for what stays dense). Gates are zero-initialised and forced into use. With --compile the repeated blocks are compiled,
each into one graph, which the time of the forward does not include.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import VSAConfig, add_gate_compress, enable_vsa
from ..cli.blocks import block_of
from ..generation.loading import compile_repeated
from . import report
from .full_size import FULL_SIZES, FullSize
from .measure import machine, this_device

COLUMNS = ("model", "what", "runs", "seconds", "x dense", "peak GB", "beyond weights GB", "weights GB")
CUDNN_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
Backend = Callable[[], AbstractContextManager]
BACKENDS: dict[str, Backend] = {
    "default": contextlib.nullcontext,
    "cudnn": lambda: sdpa_kernel(CUDNN_FIRST, set_priority=True),
}


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Parse `argv`, measure, print; returns the rows."""
    args = _parser().parse_args(argv)
    device = this_device()
    if device == "cpu" and not args.tiny:
        raise SystemExit("full-size transformers need a GPU, and this machine has none; pass --tiny.")
    measured_on = machine(device)
    rows: list[dict[str, Any]] = []
    for name in args.models:
        torch.manual_seed(0)
        for row in measure_transformer(FULL_SIZES[name], device, args):
            rows.append(row)
            if args.json is not None:
                args.json.write_text(json.dumps({"machine": measured_on, "rows": rows}, indent=1))
        _free(device)
    report.print_lines(COLUMNS, [cells(row) for row in rows], f"one forward on {measured_on['device']}", left=2)
    return rows


def measure_transformer(size: FullSize, device: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows for one transformer: dense, then each way to combine."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = size.build(device, dtype, args.tiny)
    inputs = size.make_inputs(model.config, device, dtype, args.tiny)

    @torch.no_grad()
    def forward() -> torch.Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return model(**inputs, return_dict=False)[0]

    choice = dict(_time_backends(model, forward, device))
    backend = min(choice, key=choice.__getitem__)
    dense = None
    for what in ("dense", *args.combines):
        if what == "gate":
            add_gate_compress(model)
        if what != "dense":
            implementation = args.implementation or ("triton" if device == "cuda" else "torch")
            enable_vsa(
                model,
                config=VSAConfig(
                    args.ratio, combine=what, selection=args.selection, implementation=implementation,
                    block_size=block_of(args.block_size), schedule="constant",
                ),
            )  # fmt: skip
        try:
            with BACKENDS[backend](), contextlib.ExitStack() as compiled:
                begin = time.perf_counter()
                if args.compile is None:
                    with shallow(model):
                        forward()
                else:
                    compiled.enter_context(blocks_compiled(model, args.compile))
                    forward()
                first = time.perf_counter() - begin
                measured = _measure(forward, device)
        except (RuntimeError, torch._dynamo.exc.TorchDynamoException) as error:
            print(f"{size.name}: {what} cannot run: {str(error)[:200]}")
            continue
        dense = measured["seconds"] if what == "dense" else dense
        yield {
            "model": size.name,
            "checkpoint": size.checkpoint,
            "video": size.video,
            "video_shape": size.video_shape(args.tiny),
            "batch": size.batch,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "what": f"dense {backend}" if what == "dense" else f"{what} {args.ratio:g}",
            "compile": args.compile,
            "block_size": args.block_size,
            "first_seconds": first,
            "first_blocks_seconds": choice,
            "speedup": dense and dense / measured["seconds"],
            **measured,
        }


@contextlib.contextmanager
def shallow(model: torch.nn.Module) -> Iterator[None]:
    """Only the first block of each kind: enough to compile kernels and plan matrix products for the whole model."""
    stacks = {name: child for name, child in model.named_children() if isinstance(child, torch.nn.ModuleList)}
    for name, stack in stacks.items():
        setattr(model, name, stack[:1])
    try:
        yield
    finally:
        for name, stack in stacks.items():
            setattr(model, name, stack)


@contextlib.contextmanager
def blocks_compiled(model: torch.nn.Module, mode: str) -> Iterator[None]:
    """The model's repeated blocks compiled, each into one graph; compiled anew however often they were before."""
    torch._dynamo.reset()
    compile_repeated(model, fullgraph=True, mode=mode)
    try:
        yield
    finally:
        for module in model.modules():
            module._compiled_call_impl = None


def _time_backends(
    model: torch.nn.Module, forward: Callable[[], torch.Tensor], device: str
) -> Iterator[tuple[str, float]]:
    """Seconds of the second forward through the first blocks, for each backend that runs."""
    for name in BACKENDS if device == "cuda" else ("default",):
        try:
            with BACKENDS[name](), shallow(model):
                forward()
                yield name, _time(forward, device)
        except RuntimeError as error:
            print(f"{type(model).__name__}: dense {name} cannot run: {str(error)[:200]}")


def _measure(forward: Callable[[], torch.Tensor], device: str) -> dict[str, Any]:
    """Median seconds of one forward if it is slow, else of up to five; memory of the first in bytes."""
    weights = peak = None
    if device == "cuda":
        torch.cuda.synchronize()
        weights = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    seconds = [_time(forward, device)]
    if weights is not None:
        peak = torch.cuda.max_memory_allocated()
    seconds += [_time(forward, device) for _ in range(min(4, int(3 / seconds[0])))]
    return {
        "seconds": statistics.median(seconds),
        "runs": len(seconds),
        "weights_bytes": weights,
        "peak_bytes": peak,
    }


def _time(forward: Callable[[], torch.Tensor], device: str) -> float:
    """Seconds of one forward, whose output must be finite."""
    if device == "cpu":
        begin = time.perf_counter()
        output = forward()
        seconds = time.perf_counter() - begin
    else:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        output = forward()
        end.record()
        end.synchronize()
        seconds = start.elapsed_time(end) / 1e3
    if not output.isfinite().all():
        raise RuntimeError("the forward returned NaN or infinity.")
    return seconds


def _free(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def cells(row: dict[str, Any]) -> list[str]:
    """One result as the table shows it; what was not measured stays empty."""
    speedup = "" if row["speedup"] is None else f"{row['speedup']:.2f}"
    memory = ["", "", ""]
    if row["peak_bytes"] is not None:
        peak, weights = row["peak_bytes"], row["weights_bytes"]
        memory = [f"{number / 1e9:.1f}" for number in (peak, peak - weights, weights)]
    return [row["model"], row["what"], str(row["runs"]), f"{row['seconds']:.3f}", speedup, *memory]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vsa_diffusers.bench.transformers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names: Sequence[str] = list(FULL_SIZES)
    parser.add_argument("--models", nargs="+", default=names, choices=names, metavar="MODEL", help=", ".join(names))
    parser.add_argument("--ratio", type=float, default=0.2, help="top_k_ratio")
    parser.add_argument("--combines", nargs="+", default=["merge", "gate"], choices=["merge", "gate", "sparse", "sum"])
    parser.add_argument("--selection", default="auto", choices=["auto", "mean", "quarters"], help="of key tiles")
    parser.add_argument(
        "--block-size", nargs="+", metavar="N", help='three numbers, or "auto"; as enable_vsa if left out'
    )
    parser.add_argument(
        "--compile", nargs="?", const="default", metavar="MODE", help="compile the blocks, in a mode of torch.compile"
    )
    parser.add_argument("--implementation", choices=["auto", "triton", "torch"], help="triton on a GPU unless given")
    parser.add_argument("--tiny", action="store_true", help="small models of the same make")
    parser.add_argument("--json", type=Path, help="write all rows to this file")
    return parser


if __name__ == "__main__":
    main()
