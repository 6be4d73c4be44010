"""Measure all that make_performance.py shows, on this GPU, with the code as it is, each table in its own process.

python docs/measure_performance.py measured              # into that folder, under names that begin with the GPU's
python docs/measure_performance.py measured --seconds 500  # begin nothing that would end later; call again to go on

What is in the folder already is not measured again. Other packages (`h200-peers*.json`) are not part of it.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch

BENCH = "-m vsa_diffusers.bench"
MODELS = "-m vsa_diffusers.bench.transformers --combines merge"
BY_QUARTERS = f"{BENCH} --selection quarters --combines merge --ratios 0.5 0.2 0.1"
TRAINED = "--shapes wan1.3b-480p ltx2-512p hunyuan-720p"
GATED = "--shapes ltx2-512p wan1.3b-480p wan14b-720p"
# Those that get another block than (4, 4, 4).
FITTED = "--shapes wan1.3b-480p wan14b-720p hunyuan-720p cogvideox-480p"
MOST_HELD_GB = 2.0  # this process holds half of one
# By file: what Python runs, and how many seconds that took on an H200.
COMMANDS = {
    "forward": (f"{BENCH} --selection mean", 131),
    "compiled": (f"{MODELS} --compile", 319),
    "quarters": (BY_QUARTERS, 60),
    "quarters-auto": (f"{BY_QUARTERS} --block-size auto {FITTED}", 61),
    "transformers": (MODELS, 169),
    "backward": (f"{BENCH} --backward --combines gate merge --ratios 0.5 0.2 0.1 {TRAINED}", 110),
    "captured": (f"{MODELS} --compile reduce-overhead --models wan1.3b-480p ltx2-512p", 45),
    "dense-gate": (f"{BENCH} --ratios 1.0 0.2 --combines gate {GATED}", 26),
}


def main() -> None:
    """Parse the arguments, and measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the JSON goes")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing that would end later")
    parser.add_argument("--only", nargs="+", default=list(COMMANDS), choices=COMMANDS, help="these tables")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("these tables are of a GPU, and there is none here.")
    args.folder.mkdir(parents=True, exist_ok=True)
    gpu = torch.cuda.get_device_name().removeprefix("NVIDIA ").split()[0].lower()
    began = time.monotonic()
    for name in args.only:
        command, expected = COMMANDS[name]
        file = args.folder / f"{gpu}-{name}.json"
        passed = time.monotonic() - began
        if file.exists():
            print(f"{file} is there already")
        elif passed + expected > args.seconds:
            print(f"{file} is left: it takes about {expected} s, and {passed:.0f} of {args.seconds:.0f} have passed")
        else:
            refuse_company()
            partial = file.with_suffix(".partial")
            subprocess.run([sys.executable, *command.split(), "--json", str(partial)], check=True)
            partial.rename(file)
            print(f"{file} took {time.monotonic() - began - passed:.0f} s", flush=True)


def refuse_company() -> None:
    """Stop where another process holds memory of this GPU, since the times would be of both."""
    free, total = torch.cuda.mem_get_info()
    held = (total - free) / 1e9
    if held > MOST_HELD_GB:
        raise SystemExit(f"{held:.1f} GB of this GPU are held, so another process is on it: end that, or wait for it.")


if __name__ == "__main__":
    main()
