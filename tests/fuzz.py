"""Random calls of the operation against the fp64 oracle: `PYTHONPATH=.:tests/support python tests/fuzz.py --cases 9`.

Prints a line for every failure, with the command that repeats it, and one line at the end. `--implementation
interpreter` runs the kernels without a GPU and needs TRITON_INTERPRET=1.
"""

from __future__ import annotations

import argparse
import sys
import time

import torch

from fuzz_cases import LIMITS, make_case
from fuzz_checks import Report, Wrong, check


def run(seed: int, indices, implementation: str, *, gradients: bool) -> Report:
    """Check the cases of these numbers."""
    report = Report()
    device = "cuda" if implementation == "cuda" else "cpu"
    name = "torch" if implementation == "torch" else "triton"
    for index in indices:
        case = make_case(seed, index, LIMITS[implementation])
        try:
            check(case, name, device, report, gradients=gradients)
        except Exception as error:  # whatever it is, it is a failure of this case and the others go on
            what = str(error) if isinstance(error, Wrong) else f"{type(error).__name__}: {error}"
            again = f"--implementation {implementation} --seed {seed} --only {index}{' --gradients' * gradients}"
            report.failures.append(f"{again}: {what}\n    {case}")
            print("FAILURE", report.failures[-1], flush=True)
        if device == "cuda" and torch.cuda.memory_reserved() > 2**32:  # others run beside this one
            torch.cuda.empty_cache()
    return report


def main() -> None:
    """Read the command line, run, and exit with 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--only", type=int, help="the number of one case to repeat")
    parser.add_argument("--implementation", choices=tuple(LIMITS), default="torch")
    parser.add_argument("--gradients", action="store_true", help="the backward pass, too")
    parser.add_argument("--shard", default="0/1", help="i/n: every n-th case, from the i-th on")
    options = parser.parse_args()
    shard, shards = map(int, options.shard.split("/"))
    indices = range(shard, options.cases, shards) if options.only is None else [options.only]
    torch.set_num_threads(1)
    if options.implementation == "interpreter":
        from interpreter import bfloat16_products, boolean_masks, without_idle_work

        bfloat16_products()
        boolean_masks()
        without_idle_work()
    start = time.monotonic()
    report = run(options.seed, indices, options.implementation, gradients=options.gradients)
    print(f"{report.summary()}; {time.monotonic() - start:.0f} s", flush=True)
    sys.exit(bool(report.failures))


if __name__ == "__main__":
    main()
