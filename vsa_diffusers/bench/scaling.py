"""Measure whole transformers on one GPU and spread over several of one host.

    torchrun --nproc-per-node 8 -m vsa_diffusers.bench.scaling --json scaling.json
    torchrun --nproc-per-node 2 -m vsa_diffusers.bench.scaling --models wan14b-720p --what merge --ratio 0.1
    torchrun --nproc-per-node 8 -m vsa_diffusers.bench.scaling --train --json training.json
    torchrun --nproc-per-node 2 -m vsa_diffusers.bench.scaling --train --layers 8    # what two GPUs can hold

Weights and inputs are random and the same on every rank. Each rank first runs every forward alone; then 2, 4, 8 ranks
run it together, as many groups side by side as there are ranks for, by Ulysses, and where the pipeline makes two
predictions a step, both, by guidance over two groups with Ulysses inside.

A time is that of the slowest rank, and the JSON has all ranks': seconds of the forward, of attention with its exchange,
of the exchange and of its copies, bytes sent to others, peak memory, the difference to the output of one GPU, and the
tiles and pairs of tokens that the first block of each kind attends to.

With --train it is one step of training instead, with weights, gradients and AdamW's moments sharded over all ranks
(FSDP2), and each video over --context-parallel of them; its loss is compared with that of a forward of the whole model
on that many.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..cli.blocks import block_of
from ..models import require_family
from . import report
from .full_size import FULL_SIZES, FullSize
from .measure import machine
from .parts import counted_tiles, timed_parts
from .scaling_training import COLUMNS as TRAINING_COLUMNS
from .scaling_training import cells as training_cells
from .scaling_training import measure_steps
from .spreading import add_random_gates, from_all, make_mesh, number_of_layers, set_attention, spread
from .transformers import BACKENDS, _free, _time, shallow

COLUMNS = (
    *("model", "what", "GPUs", "way", "seconds", "x one", "attention", "exchange", "copies", "MB sent"),
    *("error", "uneven %", "peak GB"),
)
SIZES = FULL_SIZES | {
    "wan14b-480p": replace(FULL_SIZES["wan14b-720p"], name="wan14b-480p", video=(81, 480, 832), latents=(21, 60, 104))
}
ALONE, ULYSSES, GUIDANCE, BOTH = "alone", "Ulysses", "guidance", "guidance, Ulysses inside"


@dataclass
class Alone:
    """What a GPU found by itself: one forward's seconds, its output, and the output with the other prompt."""

    seconds: float
    output: torch.Tensor
    other: torch.Tensor | None


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Parse `argv`, measure, print on the first rank; returns the rows."""
    args = _parser().parse_args(argv)
    device = "cuda" if torch.cuda.is_available() and not args.tiny else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    own_group = not dist.is_initialized()
    if own_group:
        dist.init_process_group()
    settle(args, dist.get_world_size())
    measure_rows = measure_steps if args.train else measure_model
    columns, to_cells = (TRAINING_COLUMNS, training_cells) if args.train else (COLUMNS, cells)
    rows: list[dict[str, Any]] = []
    measured_on = machine(device) | {"ranks": dist.get_world_size()}
    for name in args.models:
        for row in measure_rows(shortened(SIZES[name], args.layers), device, args):
            rows.append(row)
            if dist.get_rank() == 0:
                print(" | ".join(to_cells(row)), flush=True)
                if args.json is not None:
                    args.json.write_text(json.dumps({"machine": measured_on, "rows": rows}, indent=1))
        _free(device)
    if dist.get_rank() == 0:
        what = "one step of training" if args.train else "one forward"
        report.print_lines(columns, [to_cells(row) for row in rows], f"{what} on {measured_on['device']}", left=2)
    if own_group:
        dist.destroy_process_group()
    return rows


def settle(args: argparse.Namespace, ranks: int) -> None:
    """Choices that depend on one another, where they were left open.

    Raises:
        ValueError: a number of GPUs does not divide the number of processes, nothing would be measured, or the folder
            for the JSON does not exist.
    """
    for option, number in (("--runs", args.runs), ("--layers", args.layers)):
        if number is not None and number < 1:
            raise ValueError(f"{option} {number} leaves nothing to measure; give 1 or more.")
    if args.json is not None and not args.json.parent.is_dir():
        raise ValueError(f"--json {args.json}: there is no folder {args.json.parent}; make it first.")
    if args.models is None:
        args.models = ["wan14b-480p"] if args.train else ["wan1.3b-480p", "wan14b-720p", "hunyuan-720p"]
    if args.what is None:
        args.what = ["merge"] if args.train else ["dense", "merge", "gate"]
    if args.ratio is None:
        args.ratio = 0.125 if args.train else 0.2
    args.block_size = args.block_size and block_of(args.block_size)
    if args.gpus is None:
        args.gpus = [gpus for gpus in (2, 4, 8) if ranks % gpus == 0]
    if args.context_parallel is None:
        args.context_parallel = min(2, ranks)
    for option, numbers in (("--gpus", args.gpus), ("--context-parallel", [args.context_parallel])):
        for gpus in numbers:
            if gpus < 1 or ranks % gpus:
                raise ValueError(f"{option} {gpus} does not divide the {ranks} processes that torchrun started.")


def shortened(size: FullSize, layers: int | None) -> FullSize:
    """The same with that many layers, of each kind of which a model has stacks."""
    if layers is None:
        return size
    fewer = {"num_layers": layers} | ({"num_single_layers": layers} if "num_single_layers" in size.tiny else {})
    return replace(size, config=size.config | fewer, tiny=size.tiny | fewer)


def measure_model(size: FullSize, device: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows of one transformer: alone, then over each number of ranks by Ulysses, and by guidance with Ulysses."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    model = size.build(device, dtype, args.tiny)
    inputs = size.make_inputs(model.config, device, dtype, args.tiny)
    guided = args.guidance and size.cls.startswith("Wan") and bool(args.gpus)
    other = inputs | {"encoder_hidden_states": torch.randn_like(inputs["encoder_hidden_states"])}
    if "gate" in args.what:
        add_random_gates(model)

    def forward() -> torch.Tensor:
        return model(**inputs, return_dict=False)[0]

    def step() -> torch.Tensor:
        first, second = model(**inputs, return_dict=False)[0], model(**other, return_dict=False)[0]
        return torch.stack([first, second])

    found: dict[str, Alone] = {}
    with torch.no_grad(), BACKENDS["cudnn" if device == "cuda" else "default"]():
        for what in args.what:
            words = set_attention(model, what, args.ratio, args.block_size)
            row, output = measured(size, model, forward, device, args)
            found[what] = Alone(row["seconds"], output, model(**other, return_dict=False)[0] if guided else None)
            yield {"what": words, "gpus": 1, "way": ALONE} | row
        for gpus in args.gpus:
            ways = [(ULYSSES, 1)] if args.ulysses and gpus > 1 else []
            if guided and gpus > 1 and gpus % 2 == 0:
                ways.append((GUIDANCE if gpus == 2 else BOTH, 2))
            for way, guidance in ways:
                with spread(model, make_mesh(device, gpus, guidance), args.uneven):
                    for what, alone in found.items():
                        words = set_attention(model, what, args.ratio, args.block_size)
                        expected = alone.output
                        if guidance > 1:
                            assert alone.other is not None
                            expected = torch.stack([alone.output, alone.other])
                        run = step if guidance > 1 else forward
                        row, _ = measured(size, model, run, device, args, expected)
                        row["speedup"] = guidance * alone.seconds / row["seconds"]
                        yield {"what": words, "gpus": gpus, "way": way} | row


def measured(
    size: FullSize,
    model: torch.nn.Module,
    run: Callable[[], torch.Tensor],
    device: str,
    args: argparse.Namespace,
    expected: torch.Tensor | None = None,
) -> tuple[dict[str, Any], torch.Tensor]:
    """What all ranks measure of one forward, or of one step's two, and this rank's output."""
    found, output = measure(model, run, device, args.runs)
    if expected is not None:
        found |= {"error": _error(output, expected), "equal": torch.equal(output, expected)}
    ranks = from_all(found)
    row: dict[str, Any] = {
        "model": size.name,
        "layers": number_of_layers(model),
        "video_shape": size.video_shape(args.tiny),
        "seconds": max(each["seconds"] for each in ranks),
        "time_imbalance": imbalance([each["seconds"] for each in ranks]),
        "ranks": ranks,
    }
    if ranks[0]["tiles"]:
        row["tile_imbalance"] = imbalance([each["tiles"]["kept_tiles"] for each in ranks])
        row["pair_imbalance"] = imbalance([each["tiles"]["kept_pairs"] for each in ranks])
    if expected is not None:
        row["error"] = max(each["error"] for each in ranks)
        row["equal"] = all(each["equal"] for each in ranks)
    return row, output


def measure(
    model: torch.nn.Module, run: Callable[[], torch.Tensor], device: str, runs: int
) -> tuple[dict[str, Any], torch.Tensor]:
    """Seconds of one run and of the parts of its attention in all layers, and its output.

    The first blocks run before, so that tiles are counted and kernels are compiled; of slow runs one is timed, else
    `runs`, of which all ranks take that whose slowest rank is fastest.
    """
    with shallow(model):
        with counted_tiles(model) as tiles:
            run()
        run()
    require_family(model).prepare(model)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    best: dict[str, Any] = {}
    least = math.inf
    outputs: list[torch.Tensor] = []

    def keep() -> torch.Tensor:
        outputs[:] = [run()]
        return outputs[0]

    for _ in range(runs):
        dist.barrier()
        with timed_parts(model, device) as parts:
            seconds = _time(keep, device)
        slowest = max(from_all(seconds))
        if slowest < least:
            least, best = slowest, {"seconds": seconds, **parts.totals()}
        if slowest > 3:
            break
    best["tiles"] = tiles
    if device == "cuda":
        best["peak_bytes"] = torch.cuda.max_memory_allocated()
    return best, outputs[0]


def imbalance(values: Sequence[float]) -> float:
    """How much more than the mean the largest is, as a share of the mean."""
    return max(values) * len(values) / sum(values) - 1


def _error(output: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm."""
    difference = torch.linalg.vector_norm(output.float() - expected.float())
    return float(difference / torch.linalg.vector_norm(expected.float()))


def cells(row: dict[str, Any]) -> list[str]:
    """One result as the table shows it, in milliseconds for parts; what was not measured stays empty."""
    slowest = max(row["ranks"], key=lambda each: each["seconds"])
    exchange = slowest.get("exchange")
    copies = None if exchange is None else slowest["to_heads"] + slowest["to_tokens"] - exchange

    def number(value: float | None, form: str, factor: float = 1) -> str:
        return "" if value is None else format(value * factor, form)

    return [
        row["model"],
        row["what"],
        str(row["gpus"]),
        row["way"],
        f"{row['seconds']:.3f}",
        number(row.get("speedup"), ".2f"),
        number(slowest.get("attention"), ".1f", 1e3),
        number(exchange, ".1f", 1e3),
        number(copies, ".1f", 1e3),
        number(slowest.get("sent_bytes"), ".0f", 1e-6),
        "equal" if row.get("equal") else number(row.get("error"), ".1e"),
        number(row.get("pair_imbalance"), ".2f", 100),
        number(slowest.get("peak_bytes"), ".1f", 1e-9),
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="torchrun -m vsa_diffusers.bench.scaling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--models", nargs="+", choices=list(SIZES), metavar="MODEL", help=", ".join(SIZES))
    parser.add_argument("--what", nargs="+", choices=["dense", "merge", "gate", "sparse", "sum"],
                        help='attention; "gate" with random gates')  # fmt: skip
    parser.add_argument("--ratio", type=float, help="top_k_ratio, constant: 0.2, in training 0.125, unless given")
    parser.add_argument("--block-size", nargs="+", metavar="N", help='three numbers, or "auto"; not for gates')
    parser.add_argument("--layers", type=int, help="that many instead of all")
    parser.add_argument("--runs", type=int, default=3, help="forwards that are timed, where they are quick; or steps")
    parser.add_argument("--gpus", nargs="+", type=int, help="together: 2, 4 and 8 unless given")
    parser.add_argument("--uneven", action="store_true", help="tokens need not divide by the number of ranks")
    parser.add_argument("--no-ulysses", dest="ulysses", action="store_false", help="leave Ulysses alone out")
    parser.add_argument("--no-guidance", dest="guidance", action="store_false", help="leave guidance out")
    parser.add_argument("--train", action="store_true", help="steps of training instead of forwards")
    parser.add_argument("--context-parallel", type=int, help="GPUs that share a video in training: 2 unless given")
    parser.add_argument("--tiny", action="store_true", help="small models of the same make, on the CPU")
    parser.add_argument("--json", type=Path, help="write all rows to this file, as they come")
    return parser


if __name__ == "__main__":
    main()
