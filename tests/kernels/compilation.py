"""Compile the kernels as the host code launches them, for GPUs that are not there, and read what the assembler says.

    python tests/kernels/compilation.py [--targets sm_90 gfx942 ...] [--head-dims 64 128] [--combines gate merge] \
        [--backward]

Inputs lie on the meta device: the launchers run as they are, with the tuning table of the target, and stop short of
the launch itself.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import math
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime.jit import JITFunction

from vsa_diffusers.kernels import backward, forward, packed, support
from vsa_diffusers.kernels.plans import BackwardLaunch, Launch
from vsa_diffusers.kernels.select import coarse, pool, quarter_scores, top_k, transpose_lists
from vsa_diffusers.kernels.sparse import backward_key, backward_pooled, backward_preprocess, backward_query
from vsa_diffusers.kernels.sparse import forward as sparse_forward
from vsa_diffusers.kernels.support import HAS_DESCRIPTORS, Device
from vsa_diffusers.problem import Problem
from vsa_diffusers.tiles import TileGrid, num_selected_tiles

KERNELS = {
    "pool": pool.pool_kernel,
    "coarse": coarse.coarse_kernel,
    "quarter scores": quarter_scores.quarter_scores_kernel,
    "top_k": top_k.top_k_kernel,
    "sparse forward": sparse_forward.sparse_forward_kernel,
}
if importlib.util.find_spec("triton.experimental.gluon") is not None:
    from vsa_diffusers.kernels.hopper.forward import hopper_forward_kernel

    KERNELS["hopper forward"] = hopper_forward_kernel
# Shared memory that one program may use, in bytes.
SHARED_LIMIT = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376, "gfx942": 65536}
BACKWARD_KERNELS = {
    "coarse": coarse.coarse_kernel,
    "coarse gradient": coarse.coarse_gradient_kernel,
    "backward preprocess": backward_preprocess.backward_preprocess_kernel,
    "rebuild lists": transpose_lists.rebuild_lists_kernel,
    "transpose lists": transpose_lists.transpose_lists_kernel,
    "order lists": transpose_lists.order_lists_kernel,
    "dq": backward_query.dq_kernel,
    "pooled dkdv": backward_pooled.pooled_dkdv_kernel,
    "dkdv": backward_key.dkdv_kernel,
}
PACKED_KERNELS = {"tile means": packed.tile_means_kernel, "add gated": packed.add_gated_kernel}
ALL_KERNELS = KERNELS | BACKWARD_KERNELS | PACKED_KERNELS


@dataclass(frozen=True)
class Report:
    """What the compiler says of one kernel. Registers and spills (bytes) are `None` for AMD targets.

    `serialized` says that asynchronous products wait for one another, for want of a clean pipeline; `main_loop_spills`
    counts the instructions of the first loop with matrix products that reach for spilled registers.
    """

    kernel: str
    target: str
    shared: int
    warps: int
    registers: int | None
    spills: int | None
    serialized: bool = False
    main_loop_spills: int = 0


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


def target_device(name: int | str) -> Device:
    if isinstance(name, str):
        return Device()
    return Device((name // 10, name % 10), descriptors=HAS_DESCRIPTORS and name >= 90)


@contextlib.contextmanager
def _compiling_for(name: int | str, compiled: dict, only: Sequence[str] | None):
    saved = triton.runtime.driver, dict(vars(triton.runtime.driver)), support.device_of
    triton.runtime.driver.set_active(_Driver(target_of(name)))
    support.device_of = lambda index: target_device(name)
    try:
        for label, kernel in ALL_KERNELS.items():

            def compile_only(*args, grid, warmup, label=label, kernel=kernel, **options):
                assert "enable_fp_fusion" in options, f"{label} leaves the fusing of products and sums to Triton"
                if only is None or label in only:
                    compiled[label] = JITFunction.run(kernel, *args, grid=grid, warmup=True, **options)

            kernel.run = compile_only
        yield
    finally:
        for kernel in ALL_KERNELS.values():
            del kernel.run
        vars(saved[0]).update(saved[1])
        support.device_of = saved[2]


def compile_call(
    name: int | str,
    *,
    gradients: bool = False,
    combine: str = "gate",
    dtype: torch.dtype = torch.bfloat16,
    head_dim: int = 128,
    video_shape: tuple[int, int, int] = (21, 30, 52),
    block_size: tuple[int, int, int] = (4, 4, 4),
    ratio: float = 0.2,
    context: tuple[int, int] = (0, 0),
    masked: bool = False,
    selection: str = "mean",
    batch: int = 1,
    heads: int = 12,
    launch: Launch | BackwardLaunch | None = None,
    only: Sequence[str] | None = None,
) -> dict[str, object]:
    """The compiled kernels (or `only` some) of one forward call, or of one backward call, by name."""
    grid = TileGrid(video_shape, block_size)
    shape = (batch, grid.num_tokens + sum(context), heads, head_dim)
    query, key, value, gate = (torch.empty(shape, dtype=dtype, device="meta") for _ in range(4))
    problem = Problem(grid, num_selected_tiles(grid.num_tiles, ratio), combine, head_dim**-0.5, *context, selection)
    mask = torch.empty((batch, sum(context)), dtype=torch.bool, device="meta") if masked else None
    gate = gate if combine == "gate" else None
    compiled: dict[str, object] = {}
    with _compiling_for(name, compiled, only):
        if gradients:
            indices = query.new_empty((batch, heads, grid.num_tiles, problem.top_k), dtype=torch.int32)
            lse = query.new_empty((batch, heads, shape[1]), dtype=torch.float32)
            backward(query, query, key, value, gate, mask, indices, lse, query, problem, launch)
        else:
            forward(query, key, value, gate, mask, problem, launch)
    return compiled


def compile_packed(name: int | str, dtype: torch.dtype = torch.bfloat16, head_dim: int = 128) -> dict[str, object]:
    """The compiled kernels of the coarse branch of a packed sequence, by name."""
    segments, video_shape, block_size = (300, 414), (37, 24, 42), (4, 4, 4)
    shape = (1, sum(segments) + math.prod(video_shape), 56, head_dim)
    tensors = [torch.empty(shape, dtype=dtype, device="meta") for _ in range(5)]
    compiled: dict[str, object] = {}
    with _compiling_for(name, compiled, None):
        packed.add_packed_coarse(*tensors, segments, video_shape, block_size)
    return compiled


def report(label: str, name: int | str, kernel) -> Report:
    """Registers and spills from the assembler, shared memory and warps from Triton's own metadata."""
    registers = spills = None
    log, loop = "", []
    if isinstance(name, int):
        with tempfile.TemporaryDirectory() as folder:
            source, binary = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
            source.write_text(kernel.asm["ptx"])
            arch = re.search(r"\.target (sm_\w+)", kernel.asm["ptx"]).group(1)
            tools = Path(triton.__file__).parent / "backends/nvidia/bin"
            command = [get_ptxas(name).path, "-v", f"--gpu-name={arch}", source, "-o", binary]
            log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
            registers = int(re.search(r"Used (\d+) registers", log).group(1))
            spills = sum(int(count) for count in re.findall(r"(\d+) bytes spill", log))
            if spills:
                command = [tools / "nvdisasm", "-c", binary]
                listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                loop = _first_matrix_loop(listing.splitlines())
    return Report(
        label,
        f"sm_{name}" if isinstance(name, int) else name,
        kernel.metadata.shared,
        kernel.metadata.num_warps,
        registers,
        spills,
        "wgmma.mma_async instructions are serialized" in log,
        sum(bool(re.search(r"\b(LDL|STL)\b", line)) for line in loop),
    )


def stale_bounds(kernel) -> list[str]:
    """Loops inside a loop whose bound was loaded before the outer one, so that it is the same in each of its rounds.

    Triton 3.6 to 3.9 drop what one round of a loop hands to the next where it bounds an inner loop and nothing else,
    and leave the bound of the first round. The kernel then waits for copies that nobody makes.
    """
    stale, outside, loops = [], set(), []  # loads outside of all loops; open loops, by their indentation
    for line in kernel.asm["ttgir"].splitlines():
        indent = len(line) - len(line.lstrip())
        while loops and indent <= loops[-1]:
            loops.pop()
        loaded = re.match(r"\s*(%\w+) = tt\.load", line)
        if loaded and not loops:
            outside.add(loaded.group(1))
        loop = re.search(r"scf\.for .* to (%\w+) step", line)
        if loop:
            if loops and loop.group(1) in outside:
                stale.append(line.strip()[:120])
            loops.append(indent)
    return stale


def _first_matrix_loop(listing: list[str]) -> list[str]:
    """The first loop of a listing that holds a matrix product and no other loop."""
    labels = {line.rstrip(":"): index for index, line in enumerate(listing) if re.fullmatch(r"\.L_x_\d+:", line)}
    loops = []
    for end, line in enumerate(listing):
        target = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line)
        if target and labels[target.group(1)] <= end:
            start = labels[target.group(1)]
            if not any(start <= inner <= end for inner, _ in loops):
                loops.append((start, end))
    bodies = (listing[start : end + 1] for start, end in loops)
    return next((body for body in bodies if any(re.search(r"MMA", line) for line in body)), [])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--targets", nargs="+", default=["sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx942"])
    parser.add_argument("--head-dims", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--combines", nargs="+", default=["gate", "merge"])
    parser.add_argument("--selection", choices=["mean", "quarters"], default="mean")
    parser.add_argument("--video-shape", type=int, nargs=3, default=(21, 30, 52), metavar=("T", "H", "W"))
    parser.add_argument("--backward", action="store_true", help="the kernels of the backward pass")
    parser.add_argument("--packed", action="store_true", help="the kernels of a packed sequence's coarse branch")
    parser.add_argument("--only", help="print nothing but this kernel")
    parser.add_argument("--layout", choices=["direct", "tiled", "descriptor"])
    parser.add_argument("--warps", type=int, default=4)
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--keys", type=int, default=64)
    parser.add_argument("--programs", type=int, default=0, help="of the Hopper kernel (with --layout)")
    args = parser.parse_args()
    form = (args.warps, args.stages, args.keys)
    launch = Launch(args.layout, *form, programs=args.programs) if args.layout else None
    if launch and args.backward:
        launch = BackwardLaunch(launch, launch)
    for target in args.targets:
        name = int(target[3:]) if target.startswith("sm_") else target
        for head_dim in args.head_dims:
            if args.packed:
                for label, kernel in compile_packed(name, head_dim=head_dim).items():
                    print(head_dim, report(label, name, kernel), flush=True)
                continue
            for combine in args.combines:
                case = {"head_dim": head_dim, "combine": combine, "launch": launch, "gradients": args.backward}
                case |= {"selection": args.selection, "video_shape": tuple(args.video_shape)}
                for label, kernel in compile_call(name, **case).items():
                    if args.only in (None, label):
                        print(head_dim, combine, report(label, name, kernel), flush=True)


if __name__ == "__main__":
    main()
