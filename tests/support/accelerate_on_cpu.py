"""Run a script on processes without GPUs, its parameters sharded (FSDP) if asked for, which accelerate does not offer.

ACCELERATE_USE_FSDP=true FSDP_VERSION=2 torchrun --nproc_per_node=2 tests/support/accelerate_on_cpu.py SCRIPT ...
"""

import os
import sys

from accelerate import state
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from leaving import run_and_leave

initialize = state.AcceleratorState.__init__


def shard(self, *args, fsdp_plugin=None, **options):
    first = not self.initialized
    initialize(self, *args, fsdp_plugin=fsdp_plugin, **options)
    if first:
        self.distributed_type = DistributedType.FSDP
        self.fsdp_plugin = fsdp_plugin or FullyShardedDataParallelPlugin()


if os.environ.get("ACCELERATE_USE_FSDP") == "true":
    state.AcceleratorState.__init__ = shard
del sys.argv[0]
run_and_leave(sys.argv[0])
