"""A Hopper GPU as far as Triton compiles for it and launches on it; nothing runs."""

import contextlib
from types import SimpleNamespace
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget

from vsa_diffusers.kernels import launch, support


class StubDriver:
    """Notes every launch in `launches`: the kernel's name, its grid and its arguments by name."""

    def __init__(self):
        self.launches = []
        self.utils = SimpleNamespace(
            load_binary=lambda name, *_: (name, name, 0, 0, 1024),
            get_device_properties=lambda device: {"max_shared_mem": 232448},
        )

    def launcher_cls(self, source, metadata):
        def launch(grid_0, grid_1, grid_2, stream, function, packed, launch_metadata, enter, leave, *arguments):
            self.launches.append(
                (function, (grid_0, grid_1, grid_2), dict(zip(source.fn.arg_names, arguments, strict=True)))
            )

        return launch

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return id(self)

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")


def _yes(query):
    return True


def _hopper(index):
    return support.Device((9, 0), support.HAS_DESCRIPTORS)


def _nothing(query, num_tiles):
    return None


@contextlib.contextmanager
def hopper_stub():
    """Within this, the kernels take tensors on the CPU for tensors on a Hopper GPU, and replay their launches."""
    saved = dict(vars(triton.runtime.driver))
    driver = StubDriver()
    triton.runtime.driver.set_active(driver)
    with (
        mock.patch.object(launch, "may_replay", _yes),
        mock.patch.object(support, "device_of", _hopper),
        mock.patch("vsa_diffusers.kernels.unsupported_reason", _nothing),
    ):
        yield driver
    vars(triton.runtime.driver).update(saved)
