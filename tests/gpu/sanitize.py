"""Small calls of every kind, for compute-sanitizer; with a number, from that one on, since racecheck takes minutes.

export PYTHONPATH=.:tests/support:tests/kernels
PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python tests/gpu/sanitize.py
compute-sanitizer --tool racecheck python tests/gpu/sanitize.py

What racecheck is known to report on the Hopper kernel is in docs/performance.md; to see the others by themselves,
add `--kernel-name-exclude kns=hopper_forward_kernel`.
"""

import sys
from dataclasses import replace
from itertools import product

import torch

from checks import JOINT, SHAPE_CASES, Case
from vsa_diffusers.kernels import backward, forward
from vsa_diffusers.kernels.support import can_describe, device_of
from vsa_diffusers.kernels.tuning import LAYOUTS

SMALL = Case(combine="gate", head_dim=64, dtype=torch.bfloat16)
IN_TURNS = replace(SMALL, head_dim=128, heads=2, programs=3, sync_chunks=2)  # the Hopper kernel, where it can run

CONTEXT = replace(JOINT, head_dim=64, dtype=torch.bfloat16)

MERGED = replace(IN_TURNS, combine="merge")

BASES = (
    SMALL,
    IN_TURNS,
    replace(MERGED, before=3, after=5),
    replace(MERGED, head_dim=64),
    CONTEXT,
    SHAPE_CASES[5],
)
CASES = [replace(base, layout=layout) for base, layout in product(BASES, LAYOUTS)]

for case in CASES[int(sys.argv[1]) if len(sys.argv) > 1 else 0 :]:
    if case.programs and not device_of(0).processors:
        continue
    query, key, value, gate, mask = case.inputs("cuda")
    if case.layout != "descriptor" or can_describe(query, device_of(0)):
        output, indices, lse = forward(query, key, value, gate, mask, case.problem, case.launch)
        torch.cuda.synchronize()
        given = (torch.randn_like(output), query, key, value, gate, mask, indices, lse, output, case.problem)
        grads = backward(*given, case.backward_launch)
        torch.cuda.synchronize()
        norms = [float(x.float().norm()) for x in (output, *grads) if x is not None]
        print(case, norms, flush=True)
