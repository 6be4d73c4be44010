"""Small calls of every kind, for compute-sanitizer.

export PYTHONPATH=.:tests:tests/kernels
PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python tests/gpu/sanitize.py
compute-sanitizer --tool racecheck python tests/gpu/sanitize.py
"""

from dataclasses import replace

import torch

from checks import JOINT, SHAPE_CASES, Case
from vsa_diffusers.kernels import backward, forward, tuning

SMALL = Case(combine="gate", head_dim=64, dtype=torch.bfloat16)
IN_TURNS = replace(SMALL, head_dim=128, heads=2, programs=3, parts=2)  # the specialised kernel, where it can run

CONTEXT = replace(JOINT, head_dim=64, dtype=torch.bfloat16)

MERGED = replace(IN_TURNS, combine="merge")

for base in (
    SMALL,
    IN_TURNS,
    replace(MERGED, before=3, after=5),
    replace(MERGED, head_dim=64),
    CONTEXT,
    SHAPE_CASES[5],
):
    for layout in tuning.LAYOUTS:
        case = replace(base, layout=layout)
        if case.programs and not tuning.device_of(0).processors:
            continue
        query, key, value, gate, mask = case.inputs("cuda")
        if layout != "descriptor" or tuning.can_describe(query, tuning.device_of(0)):
            output, indices, lse = forward(query, key, value, gate, mask, case.problem, case.launch)
            torch.cuda.synchronize()
            given = (torch.randn_like(output), query, key, value, gate, mask, indices, lse, output, case.problem)
            grads = backward(*given, case.backward_launch)
            torch.cuda.synchronize()
            norms = [float(x.float().norm()) for x in (output, *grads) if x is not None]
            print(case, norms, flush=True)
