"""Time checkouts of the package against one another on one GPU, call by call in turns.

    python tests/kernels/compare_checkouts.py OLD NEW [NEW...] --json comparison.json

OLD and NEW are folders that hold `vsa_diffusers/`, and perhaps a Triton of their own, `triton/`. Each has a process of
its own, of which one works at a time; they make the same inputs. A row is the median over rounds of new time / old
time, with the least and the greatest ratio, and by how much the norms of what they computed differ.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

FORWARD = ("ltx2-512p", "wan1.3b-480p", "hunyuan-720p")
BACKWARD = ("wan1.3b-480p",)
RATIOS = (0.5, 0.2, 0.1)
COMBINES = ("gate", "merge")
TIMED_MS = 60  # a measurement takes as many calls as fit into this, at least one
HOST_CALLS = 20  # at most, so that launches find room in the queue
DEVICE = "cuda"


class Worker:
    """A process that has imported one of the checkouts."""

    def __init__(self, root: Path):
        self.name = root.name
        command = [sys.executable, str(Path(__file__).resolve()), "--worker", str(root.resolve())]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, **question: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"The worker ended with code {self.process.wait()}; its message is above.")
        return json.loads(line)

    def tell(self, **question: Any) -> dict[str, Any]:
        self.ask(**question)
        return self.answer()


def work(root: str) -> None:
    """Answer questions on standard input until it ends: prepare a case, or measure it."""
    sys.path.insert(0, root)
    import torch

    import vsa_diffusers

    if (Path(root) / "triton").exists():
        import triton

        assert Path(triton.__file__).is_relative_to(root), f"imported {triton.__file__} instead of that of {root}"
    assert Path(vsa_diffusers.__file__).is_relative_to(root), f"imported {vsa_diffusers.__file__} instead of {root}"
    call: Callable[[], Any] = lambda: None  # noqa: E731 - until a case is prepared
    for line in sys.stdin:
        question = json.loads(line)
        if question.pop("do") == "prepare":
            del call
            torch.cuda.empty_cache()
            call = _prepared(torch, **question)
            results = call()
            results = results if isinstance(results, tuple) else (results,)
            answer = {"norms": [float(x.float().norm()) for x in results]}
            del results
        else:
            answer = _measured(torch, call)
        print(json.dumps(answer), flush=True)


def _prepared(torch, what: str, shape: str, combine: str, ratio: float) -> Callable[[], Any]:
    """The call that a case means, on inputs that depend on nothing else."""
    from vsa_diffusers import video_sparse_attention
    from vsa_diffusers.bench.shapes import parse

    torch.manual_seed(0)
    layer = parse(shape)
    query, key, value, gate = layer.inputs(DEVICE, torch.bfloat16, what == "backward")
    given = gate if combine == "gate" else None

    def forward():
        return video_sparse_attention(
            query, key, value, layer.video_shape, top_k_ratio=ratio, gate=given, combine=combine
        )

    if what == "forward":
        return forward
    leaves = [x for x in (query, key, value, given) if x is not None]
    output = forward()
    grad = torch.randn_like(output)
    return lambda: torch.autograd.grad(output, leaves, grad, retain_graph=True)


def _measured(torch, call: Callable[[], Any]) -> dict[str, float]:
    """Milliseconds of the GPU and microseconds of the host a call; the first warms up, and says how many are timed."""
    _, ms = _timed(torch, call, 1)
    calls = max(1, min(200, int(TIMED_MS / ms)))
    host_us, ms = _timed(torch, call, min(calls, HOST_CALLS))
    return {"ms": _timed(torch, call, calls)[1] if calls > HOST_CALLS else ms, "host_us": host_us}


def _timed(torch, call: Callable[[], Any], calls: int) -> tuple[float, float]:
    """Microseconds until so many calls were launched, and milliseconds until they were done, a call."""
    torch.cuda.synchronize()
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start = time.perf_counter()
    first.record()
    for _ in range(calls):
        call()
    last.record()
    host = time.perf_counter() - start
    torch.cuda.synchronize()
    return host / calls * 1e6, first.elapsed_time(last) / calls


def cases(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """What is measured, in the order in which it is."""
    shapes = [("forward", name) for name in arguments.forward] + [("backward", name) for name in arguments.backward]
    return [
        {"what": what, "shape": shape, "combine": combine, "ratio": ratio}
        for what, shape in shapes
        for combine in arguments.combines
        for ratio in arguments.ratios
    ]


def compare(workers: Sequence[Worker], case: dict[str, Any], rounds: int) -> list[dict[str, Any]]:
    """One row for each worker but the first: medians, the ratio of every round, and how far the results lie apart."""
    for worker in workers:  # all compile at the same time
        worker.ask(do="prepare", **case)
    norms = [worker.answer()["norms"] for worker in workers]
    times: list[list[dict[str, float]]] = [[] for _ in workers]
    for number in range(rounds):
        turns = range(len(workers))
        for place in turns if number % 2 == 0 else reversed(turns):
            times[place].append(workers[place].tell(do="measure"))
    old = times[0]
    return [
        {
            **case,
            "old": workers[0].name,
            "new": worker.name,
            **{f"old_{what}": statistics.median(each[what] for each in old) for what in old[0]},
            **{f"new_{what}": statistics.median(each[what] for each in new) for what in new[0]},
            "new_over_old": statistics.median(ratios),
            "ratios": ratios,
            "norms_differ_by": max(abs(x - y) / abs(x) for x, y in zip(norms[0], of_new, strict=True)),
        }
        for worker, new, of_new in zip(workers[1:], times[1:], norms[1:], strict=True)
        for ratios in [[after["ms"] / before["ms"] for before, after in zip(old, new, strict=True)]]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("folders", type=Path, nargs="*", help="that hold vsa_diffusers/, the old one first")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="where to write all rows")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=400, help="begin no other case after so long")
    parser.add_argument("--forward", nargs="*", default=FORWARD, metavar="SHAPE")
    parser.add_argument("--backward", nargs="*", default=BACKWARD, metavar="SHAPE")
    parser.add_argument("--combines", nargs="+", default=COMBINES)
    parser.add_argument("--ratios", nargs="+", type=float, default=RATIOS)
    arguments = parser.parse_args()
    if arguments.worker:
        return work(arguments.worker)
    if len(arguments.folders) < 2:
        parser.error("give two folders or more that hold vsa_diffusers/, the old one first")
    end = time.monotonic() + arguments.seconds
    workers = [Worker(folder) for folder in arguments.folders]
    print(
        "| call | combine | ratio | new | old ms | new ms | new / old | least to greatest | host µs | norms differ by |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    rows: list[dict[str, Any]] = []
    todo = cases(arguments)
    for done, case in enumerate(todo):
        if time.monotonic() > end:
            print(f"out of time: {len(todo) - done} of {len(todo)} cases are left", flush=True)
            break
        for row in compare(workers, case, arguments.rounds):
            rows.append(row)
            print(
                f"| {row['what']} {row['shape']} | {row['combine']} | {row['ratio']:g} | {row['new']} "
                f"| {row['old_ms']:.3f} | {row['new_ms']:.3f} | {row['new_over_old']:.3f} "
                f"| {min(row['ratios']):.3f} to {max(row['ratios']):.3f} "
                f"| {row['old_host_us']:.0f}, {row['new_host_us']:.0f} | {row['norms_differ_by']:.0e} |",
                flush=True,
            )
        if arguments.json:
            arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
