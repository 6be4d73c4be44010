"""Run a script with its parameters sharded (FSDP) over processes without GPUs, which accelerate does not offer.

ACCELERATE_USE_FSDP=true FSDP_VERSION=2 torchrun --nproc_per_node=2 tests/support/fsdp_on_cpu.py SCRIPT [ARGUMENTS]
"""

import runpy
import sys

from accelerate import state
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

initialize = state.AcceleratorState.__init__


def shard(self, *args, fsdp_plugin=None, **options):
    first = not self.initialized
    initialize(self, *args, fsdp_plugin=fsdp_plugin, **options)
    if first:
        self.distributed_type = DistributedType.FSDP
        self.fsdp_plugin = fsdp_plugin or FullyShardedDataParallelPlugin()


state.AcceleratorState.__init__ = shard
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
