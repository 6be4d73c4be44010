"""Run a script that spreads a video over GPUs on processes without GPUs, one of which may fail on its way.

torchrun --nproc-per-node=2 tests/support/ranks_on_cpu.py [--rank-fails=1] SCRIPT [ARGUMENTS]
"""

import os
import sys

import diffusers
import diffusers.hooks.context_parallel as hooks
import torch

from leaving import run_and_leave
from ranks import all_gather_anything

torch.set_num_threads(1)
torch.accelerator.device_count = lambda: 1
hooks._all_gather_anything = all_gather_anything
del sys.argv[0]
if sys.argv[0].startswith("--rank-fails="):
    if sys.argv[0].endswith(f"={os.environ['RANK']}"):

        def fail(*args, **kwargs):
            raise RuntimeError("this rank ran out of memory")

        diffusers.WanTransformer3DModel.forward = fail
    del sys.argv[0]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
run_and_leave(sys.argv[0])
