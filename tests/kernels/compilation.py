"""Compile the kernels as the host code launches them, for GPUs that are not there, and read what the assembler says.

    python tests/kernels/compilation.py [--targets sm_90 gfx942 ...] [--head-dims 64 128] [--combines gate merge]

Inputs lie on the meta device: the launchers run as they are, with the tuning table of the target, and stop short of
the launch itself.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from vsa_diffusers.kernels import attend, pool, run, select
from vsa_diffusers.kernels.tuning import HAS_DESCRIPTORS, Device, Launch
from vsa_diffusers.tiles import TileGrid, num_selected_tiles
from vsa_diffusers.torch_impl import Problem

KERNELS = {"pool": pool.pool_kernel, "select": select.select_kernel, "attend": attend.attend_kernel}
# Shared memory that one program may use, in bytes.
SHARED_LIMIT = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376, "gfx942": 65536}


@dataclass(frozen=True)
class Report:
    """What the compiler says of one kernel. Registers and spills (bytes) are `None` for AMD targets."""

    kernel: str
    target: str
    shared: int
    warps: int
    registers: int | None
    spills: int | None


class _Driver:
    """Stands where Triton asks which device it compiles for."""

    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return hash(self.target)  # compiled kernels are remembered by device

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("meta")

    def assemble_tensormap_to_arg(self, tensormaps_info, args):
        return args


def target_of(name: int | str) -> GPUTarget:
    return GPUTarget("cuda", name, 32) if isinstance(name, int) else GPUTarget("hip", name, 64)


def device_of(name: int | str) -> Device:
    if isinstance(name, str):
        return Device(processors=304)
    return Device((name // 10, name % 10), 132, descriptors=HAS_DESCRIPTORS and name >= 90)


@contextlib.contextmanager
def _compiling_for(name: int | str, compiled: dict):
    saved = triton.runtime.driver, dict(vars(triton.runtime.driver)), run.device_of
    triton.runtime.driver.set_active(_Driver(target_of(name)))
    run.device_of = lambda index: device_of(name)
    try:
        for label, kernel in KERNELS.items():

            def compile_only(*args, grid, warmup, label=label, kernel=kernel, **options):
                compiled[label] = JITFunction.run(kernel, *args, grid=grid, warmup=True, **options)

            kernel.run = compile_only
        yield
    finally:
        for kernel in KERNELS.values():
            del kernel.run
        vars(saved[0]).update(saved[1])
        run.device_of = saved[2]


def compile_forward(
    name: int | str,
    *,
    combine: str = "gate",
    dtype: torch.dtype = torch.bfloat16,
    head_dim: int = 128,
    video_shape: tuple[int, int, int] = (21, 30, 52),
    block_size: tuple[int, int, int] = (4, 4, 4),
    ratio: float = 0.2,
    context: tuple[int, int] = (0, 0),
    masked: bool = False,
    batch: int = 1,
    heads: int = 12,
    launch: Launch | None = None,
) -> dict[str, object]:
    """The compiled kernels of one call, by name."""
    grid = TileGrid(video_shape, block_size)
    shape = (batch, grid.num_tokens + sum(context), heads, head_dim)
    query, key, value, gate = (torch.empty(shape, dtype=dtype, device="meta") for _ in range(4))
    problem = Problem(grid, num_selected_tiles(grid.num_tiles, ratio), combine, head_dim**-0.5, *context)
    mask = torch.empty((batch, sum(context)), dtype=torch.bool, device="meta") if masked else None
    compiled: dict[str, object] = {}
    with _compiling_for(name, compiled):
        run.forward(query, key, value, gate if combine == "gate" else None, mask, problem, launch)
    return compiled


def report(label: str, name: int | str, kernel) -> Report:
    """Registers and spills from the assembler, shared memory and warps from Triton's own metadata."""
    registers = spills = None
    if isinstance(name, int):
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "kernel.ptx"
            source.write_text(kernel.asm["ptx"])
            arch = re.search(r"\.target (sm_\w+)", kernel.asm["ptx"]).group(1)
            tool = Path(triton.__file__).parent / "backends/nvidia/bin" / _assembler(name)
            command = [tool, "-v", f"--gpu-name={arch}", source, "-o", Path(folder) / "kernel.cubin"]
            log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        registers = int(re.search(r"Used (\d+) registers", log).group(1))
        spills = sum(int(count) for count in re.findall(r"(\d+) bytes spill", log))
    target = f"sm_{name}" if isinstance(name, int) else name
    return Report(label, target, kernel.metadata.shared, kernel.metadata.num_warps, registers, spills)


def _assembler(name: int) -> str:
    blackwell = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas-blackwell"
    return "ptxas-blackwell" if name >= 100 and blackwell.exists() else "ptxas"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--targets", nargs="+", default=["sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx942"])
    parser.add_argument("--head-dims", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--combines", nargs="+", default=["gate", "merge"])
    parser.add_argument("--layout", choices=["direct", "tiled", "descriptor"])
    parser.add_argument("--warps", type=int, default=4)
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--keys", type=int, default=64)
    args = parser.parse_args()
    launch = Launch(args.layout, args.warps, args.stages, args.keys) if args.layout else None
    for target in args.targets:
        name = int(target[3:]) if target.startswith("sm_") else target
        for head_dim in args.head_dims:
            for combine in args.combines:
                for label, kernel in compile_forward(name, head_dim=head_dim, combine=combine, launch=launch).items():
                    print(head_dim, combine, report(label, name, kernel), flush=True)


if __name__ == "__main__":
    main()
