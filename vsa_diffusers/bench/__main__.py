"""Measure one attention layer: dense, this package, and fastvideo-kernel where it is installed.

    python -m vsa_diffusers.bench --shapes wan1.3b-480p 1x12x21x30x52x128 --ratios 0.3 0.1 --json out.json
    python -m vsa_diffusers.bench --sweep sweep/   # every launch of the sparse kernel, for the tuning table
    python -m vsa_diffusers.bench --sweep sweep/ --backward --shapes wan1.3b-480p --ratios 0.2   # of its gradients

TFLOP/s count the products of valid tokens that the ratio asks for. Without a GPU it measures a small shape.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from . import report, subjects, sweep, sweep_backward
from .measure import Measurement, measure
from .shapes import CPU_SHAPE, SHAPES, Shape, parse


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Parse `argv`, measure, print; returns the rows."""
    args = _parser().parse_args(argv)
    args.block_size = "auto" if args.block_size == ["auto"] else [int(extent) for extent in args.block_size]
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    names = args.shapes or (list(SHAPES) if device == "cuda" else None)
    shapes = [CPU_SHAPE] if names is None else [parse(name) for name in names]
    if args.sweep is not None:
        run = sweep_backward.sweep if args.backward else sweep.sweep
        rows = run(shapes, args.ratios, args.combines, args.sweep, args.seconds)
        print("\n".join(sweep.best(rows)))
        return rows
    implementations = args.implementations or (["triton"] if device == "cuda" else ["torch"])
    rows = []
    for shape in shapes:
        mine = list(_measure_shape(shape, device, implementations, args))
        report.print_table(
            mine, f"{shape.name}: {shape.tokens} tokens, {shape.batch} x {shape.heads} x {shape.head_dim}"
        )
        rows += mine
        if args.json is not None:
            args.json.write_text(json.dumps({"machine": _machine(device), "rows": rows}, indent=1))
    if args.plot is not None:
        report.plot(rows, args.plot)
    return rows


def _measure_shape(shape: Shape, device: str, implementations: list[str], args: argparse.Namespace):
    dtype = getattr(torch, args.dtype) if device == "cuda" else torch.float32
    inputs = shape.inputs(device, dtype, args.backward)

    def timed(call) -> Measurement:
        if not args.backward:
            with torch.no_grad():
                return measure(call, device)
        output = call()
        grad, leaves = torch.randn_like(output), inputs

        def both():
            return torch.autograd.grad(call(), leaves, grad, allow_unused=True)

        return measure(both, device)

    fastest = float("inf")
    for name, call in subjects.dense(inputs, device):
        try:
            result = timed(call)
        except RuntimeError as error:
            print(f"{shape.name}: {name} cannot run: {str(error)[:200]}")
            continue
        fastest = min(fastest, result.ms)
        yield _row(shape, name, None, result, result.ms, args.backward)
    calls: list[tuple[str, Callable[[float], subjects.Call]]] = [
        (
            f"{implementation} {combine}",
            functools.partial(_ours, inputs, shape, combine, implementation, args),
        )
        for implementation in implementations
        for combine in args.combines
    ]
    if subjects.has_peer() and device == "cuda":
        peer = subjects.Peer(shape, device)
        calls.append(("fastvideo-kernel", lambda ratio: functools.partial(peer, inputs, ratio)))
    for name, make in calls:
        for ratio in args.ratios:
            try:
                result = timed(make(ratio))
            except (RuntimeError, ValueError, AssertionError) as error:
                print(f"{shape.name}: {name} at {ratio} cannot run: {str(error)[:200]}")
                continue
            yield _row(shape, name, ratio, result, fastest, args.backward)


def _ours(inputs, shape, combine, implementation, args: argparse.Namespace, ratio) -> subjects.Call:
    return subjects.ours(inputs, shape, ratio, combine, implementation, args.block_size, args.selection)


def _row(shape: Shape, what: str, ratio: float | None, result: Measurement, dense_ms: float, backward: bool):
    flops = shape.dense_flops * (1 if ratio is None else ratio) * (3.5 if backward else 1)
    return {
        "shape": shape.name,
        "what": what,
        "ratio": ratio,
        "backward": backward,
        "tflops": flops / result.ms * 1e-9,
        "speedup": dense_ms / result.ms,
        "spread": result.spread,
        **vars(result),
    }


def _machine(device: str) -> dict[str, str]:
    name = torch.cuda.get_device_name(0) if device == "cuda" else "cpu"
    return {"device": name, "torch": torch.__version__}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vsa_diffusers.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", help=f"of {', '.join(SHAPES)}, or BxHxTxHxWxD")
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.5, 0.3, 0.2, 0.1])
    parser.add_argument("--combines", nargs="+", default=["gate", "merge"], choices=["gate", "sum", "sparse", "merge"])
    parser.add_argument("--implementations", nargs="+", choices=["auto", "triton", "torch"])
    parser.add_argument("--block-size", nargs="+", default=["4", "4", "4"], help='three numbers, or "auto"')
    parser.add_argument(
        "--selection", choices=["mean", "quarters"], default="mean", help="what key tiles are scored by"
    )
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--backward", action="store_true", help="measure forward and backward together")
    parser.add_argument("--json", type=Path, help="write all rows to this file")
    parser.add_argument("--plot", type=Path, help="draw the speed-ups into this file (needs matplotlib)")
    parser.add_argument("--sweep", type=Path, help="time every launch of the sparse kernel; results in this directory")
    parser.add_argument("--seconds", type=float, default=480, help="end a sweep after so long")
    return parser


if __name__ == "__main__":
    main()
