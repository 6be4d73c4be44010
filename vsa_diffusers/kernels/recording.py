"""Launches that are made once the ordinary way, and from then on again with nothing but other addresses.

Most of what the host does for a call comes out the same for every call of the same shapes: the plan, the grids, the
arguments, the look-up of each compiled kernel. A `Recording` notes them while the first call runs; a `Replay` fills in
the addresses of the next call's tensors, and takes all memory in between as one workspace.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
import triton

ALIGNMENT = 512  # bytes, as PyTorch's allocator for CUDA devices aligns
Tensors = Sequence[Any]  # those of a call, `None` for an optional one that was not given


class Launcher:
    """Where the kernels of one call get their memory, and how they are launched: one by one, as they come."""

    def empty(self, like: torch.Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> torch.Tensor:
        """Memory on the device of `like`, and of its dtype unless told otherwise, until `free` or `end_part`."""
        return like.new_empty(shape, dtype=dtype)

    def slices(self, tensors: Tensors, axis: int, part: slice) -> list[Any]:
        """Some of the heads or tokens of the call's own tensors, of memory from `empty`, or of parts of those."""
        return [None if x is None else x[(slice(None),) * axis + (part,)] for x in tensors]

    def free(self, *tensors: torch.Tensor | None) -> None:
        """What follows may overwrite these."""

    def release_all(self) -> None:
        """What follows may overwrite everything that came from `empty`."""

    def launch(self, kernel: Any, grid: tuple[int, ...], *arguments: object, **options: object) -> None:
        """`kernel[grid](*arguments, **options)`."""
        kernel[grid](*arguments, **options)


# Plain tuples: they are unpacked several times as fast as named ones.
# Where an argument's memory lies: its number; which of the call's tensors or, after those, the workspace; bytes from
# the start of that; and the tensor or descriptor as it was recorded, without its memory.
Binding = tuple[int, int, int, Any]
# One launch: what takes all arguments in the kernel's own order, those, and which of them are pointers and descriptors.
RecordedLaunch = tuple[Callable[..., object], list[object], list[Binding], list[Binding]]


class Replay:
    """The launches of a call that was recorded, for other tensors of the same dtypes, shapes, strides and alignment."""

    def __init__(self, steps: list[RecordedLaunch], workspace_bytes: int, interpreted: bool):
        self.steps = steps
        self.workspace_bytes = workspace_bytes
        self.interpreted = interpreted

    def run(self, tensors: Tensors) -> None:
        """Launch everything on `tensors`, in the order in which they were recorded; the first of them is not `None`."""
        device = tensors[0].device
        workspace = torch.empty(self.workspace_bytes, dtype=torch.uint8, device=device)
        if self.interpreted:
            return self._interpret([*tensors, workspace])
        addresses = [0 if x is None else x.data_ptr() for x in tensors]
        addresses.append(workspace.data_ptr())
        # Looked up once for all launches; each would look up device and stream anew.
        stream = triton.runtime.driver.active.get_current_stream(device.index)
        for run, recorded, pointers, descriptors in self.steps:
            arguments = recorded.copy()
            for argument, tensor, offset, _ in pointers:
                arguments[argument] = addresses[tensor] + offset
            for argument, tensor, offset, descriptor in descriptors:
                arguments[argument] = _moved(descriptor, _Address(addresses[tensor] + offset))
            run(*arguments, stream=stream)
        return None

    def _interpret(self, tensors: Tensors) -> None:
        """The same for Triton's interpreter, which wants tensors where a GPU takes addresses."""

        def view(tensor: int, offset: int, like: torch.Tensor) -> torch.Tensor:
            whole = tensors[tensor]
            assert whole is not None
            if tensor == len(tensors) - 1:  # the workspace
                whole = whole[offset:][: like.nbytes].view(like.dtype)
                return whole.as_strided(like.shape, like.stride())
            first = whole.storage_offset() + offset // like.itemsize
            return whole.as_strided(like.shape, like.stride(), first)

        for run, recorded, pointers, descriptors in self.steps:
            arguments = recorded.copy()
            for argument, tensor, offset, form in pointers:
                arguments[argument] = view(tensor, offset, form)
            for argument, tensor, offset, form in descriptors:
                arguments[argument] = _moved(form, view(tensor, offset, form.base))
            run(*arguments)


def _moved(descriptor: Any, base: object) -> Any:
    """A copy of a tensor descriptor for other memory; `copy.copy` would take longer than a launch."""
    moved = object.__new__(type(descriptor))
    moved.__dict__.update(descriptor.__dict__)
    moved.base = base
    return moved


class _Address:
    """What a tensor descriptor asks of its tensor when a kernel is launched."""

    __slots__ = ("address",)

    def __init__(self, address: int):
        self.address = address

    def data_ptr(self) -> int:
        return self.address


class Recorder(Launcher):
    """Launches as `Work` does, and notes what a `Replay` needs. `tensors` are the call's own, inputs and outputs."""

    def __init__(self, tensors: Tensors):
        # Tensors are told apart by identity: their memory may overlap, where query, key and value are one projection.
        self.tensors = [None if x is None else x.detach() for x in tensors]
        self.workspace = len(self.tensors)
        self.bindings = {id(x): (index, 0) for index, x in enumerate(self.tensors)}
        self.views: list[object] = []  # keeps what `places` tells apart alive
        self.rooms: dict[int, tuple[torch.Tensor, int, int]] = {}  # tensor in the workspace, its start and end
        self.workspace_bytes = 0
        self.steps: list[RecordedLaunch] = []
        self.interpreted = False

    def empty(self, like: torch.Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> torch.Tensor:
        x = super().empty(like, shape, dtype)
        size = -(-max(x.nbytes, 1) // ALIGNMENT) * ALIGNMENT
        start = 0  # the first gap that is wide enough
        for _, taken, end in sorted(self.rooms.values(), key=lambda room: room[1]):
            if taken - start >= size:
                break
            start = end
        self.rooms[id(x)] = x, start, start + size
        self.workspace_bytes = max(self.workspace_bytes, start + size)
        return x

    def slices(self, tensors: Tensors, axis: int, part: slice) -> list[Any]:
        slices = super().slices(tensors, axis, part)
        for whole, some in zip(tensors, slices, strict=True):
            if whole is not None and some is not None:
                index, offset = self._binding_of(whole)
                self.bindings[id(some)] = index, offset + some.data_ptr() - whole.data_ptr()
        self.views += slices
        return slices

    def free(self, *tensors: torch.Tensor | None) -> None:
        for x in tensors:
            self.rooms.pop(id(x), None)

    def release_all(self) -> None:
        self.rooms.clear()

    def launch(self, kernel: Any, grid: tuple[int, ...], *arguments: object, **options: object) -> None:
        compiled = kernel[grid](*arguments, **options)
        names = kernel.arg_names
        named = dict(zip(names, arguments, strict=False)) | options
        ordered = [named[name] for name in names]
        pointers, descriptors = [], []
        for index, argument in enumerate(ordered):
            if isinstance(argument, torch.Tensor):
                pointers.append((index, *self._binding_of(argument), _form(argument)))
                ordered[index] = None
            elif hasattr(argument, "block_shape"):
                form = _moved(argument, _form(argument.base))
                descriptors.append((index, *self._binding_of(argument.base), form))
                ordered[index] = None
        self.interpreted = not isinstance(kernel, triton.runtime.JITFunction)
        run = kernel[grid] if self.interpreted else compiled[(*grid, 1, 1)[:3]]
        self.steps.append((run, ordered, pointers, descriptors))

    def _binding_of(self, x: torch.Tensor) -> tuple[int, int]:
        """Which tensor `x` belongs to, and bytes from there. Memory from `empty` is never shared, so addresses tell."""
        if id(x) in self.bindings:
            return self.bindings[id(x)]
        if id(x) in self.rooms:
            return self.workspace, self.rooms[id(x)][1]
        for whole, start, _ in self.rooms.values():
            offset = x.data_ptr() - whole.data_ptr()
            if 0 <= offset < whole.nbytes:
                return self.workspace, start + offset
        raise AssertionError("A kernel was given memory that is neither an argument of the call nor from its workspace")

    def replay(self) -> Replay:
        """What was recorded."""
        return Replay(self.steps, self.workspace_bytes, self.interpreted)


def _form(x: torch.Tensor) -> torch.Tensor:
    """Dtype, shape and strides of a tensor, without its memory."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


class Replays:
    """Replays of the latest kinds of calls, under at most `most` keys."""

    def __init__(self, most: int = 512):
        self.most = most
        self.known: dict[Hashable, Replay] = {}
        self.lock = threading.Lock()

    def run(self, key: Hashable, tensors: Tensors, launch_all: Callable[[Launcher, Tensors], None]) -> Replay:
        """`launch_all` the first time that `key` is seen; from then on what it did, again for these tensors.

        Args:
            key: everything but the form of `tensors` that decides which kernels are launched, and with which numbers.
            tensors: those that the launches read and write.
            launch_all: takes where to launch, and `tensors`.
        """
        replay = self.find(key, tensors)
        if replay is not None:
            replay.run(tensors)
            return replay
        recording = Recorder(tensors)
        launch_all(recording, recording.tensors)
        replay = recording.replay()
        self.remember(key, tensors, replay)
        return replay

    def find(self, key: Hashable, tensors: Tensors) -> Replay | None:
        """What is remembered under `key` for tensors of this form, if anything is."""
        return self.known.get((key, *_forms(tensors)))

    def remember(self, key: Hashable, tensors: Tensors, replay: Replay) -> None:
        """Let `find` return `replay` for `key` and all tensors of the form of these, which it does not keep."""
        key = (key, *_forms(tensors))
        with self.lock:
            while len(self.known) >= self.most and key not in self.known:
                del self.known[next(iter(self.known))]
            self.known[key] = replay

    def clear(self) -> None:
        """Forget everything."""
        self.known.clear()


def _forms(tensors: Tensors) -> list[Hashable]:
    """All that launches depend on but the address: Triton compiles other code where it is no multiple of 16."""
    return [None if x is None else (x.dtype, x.shape, x.stride(), x.device, x.data_ptr() % 16) for x in tensors]
