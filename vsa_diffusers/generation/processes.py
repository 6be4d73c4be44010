"""Several processes that make one video together, as torchrun starts them."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist


def is_one_of_several() -> bool:
    """Whether torchrun started this process together with others."""
    return dist.is_torchelastic_launched() and int(os.environ["WORLD_SIZE"]) > 1


def is_first() -> bool:
    """Whether this process is the one that tells and writes."""
    return not dist.is_initialized() or dist.get_rank() == 0


@contextmanager
def joined_processes(minutes: float = 5, tell: Callable[[BaseException], None] | None = None) -> Iterator[torch.device]:
    """Join the processes that torchrun started; yields this one's device.

    Args:
        minutes: after which a process that waits for others gives up.
        tell: prints an error; `None` prints the traceback. The process ends then, and torchrun ends the others.
    """
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group(timeout=timedelta(minutes=minutes))
    try:
        yield device
    except BaseException as error:
        # What waits for this process on its way out would wait for the others: torchrun ends them at once.
        if tell is None:
            traceback.print_exc()
        else:
            tell(error)
        sys.stderr.flush()
        os._exit(1)
    dist.destroy_process_group()
