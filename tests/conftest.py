import contextlib
import logging
import sys
from typing import Any

import pytest
import torch


def state_of_process() -> dict[str, Any]:
    """What PyTorch and logging keep for a thread or a process, for a test that leaves it changed changes the next."""
    cuda = torch.backends.cuda
    return {
        "grad": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        "default dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "modes": (len(torch.overrides._get_current_function_mode_stack()), torch._C._len_torch_dispatch_stack()),
        "denormals": torch.full((16,), 1e-40).mul(1.0).sum().item() > 0,
        "level of the log": logging.getLogger("vsa_diffusers").level,
        "backends": (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()),
    }


def seed() -> None:
    """Seed all generators; without a GPU the one there is, since PyTorch notes the stack for each of the others."""
    (torch.manual_seed if torch.cuda.is_available() else torch.default_generator.manual_seed)(0)


def native_attention():
    """What `set_attention_backend` sets on one model, diffusers keeps for every later model of the process."""
    if "diffusers" not in sys.modules:  # as where kernels alone are tested, in many processes
        return contextlib.nullcontext()
    from diffusers import attention_backend

    return attention_backend("native")


@pytest.fixture(autouse=True)
def _repeatable():
    seed()
    before = state_of_process()
    with native_attention():
        yield
    left = {name: value for name, value in state_of_process().items() if value != before[name]}
    assert not left, f"the test leaves the process changed for those after it: {left}, which was {before}"


def pytest_configure():
    # Small shapes: more threads only wait for each other.
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    # They take minutes; begun first, they do not end last.
    items.sort(key=lambda item: not item.path.name.startswith("interpreted_"))
