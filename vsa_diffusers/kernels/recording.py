"""Launches that are made once the ordinary way, and from then on again with nothing but other addresses.

Most of what the host does for a call comes out the same for every call of the same form: the plan, the grids, the
arguments, the look-up of each compiled kernel. A `Recorder` notes them while the first call runs; a `Replay` fills in
the addresses of the next call's tensors, and takes all memory in between as one workspace.

What decides a launch must be in the key that a recording is found by: the tensors' forms, and what the caller adds.
`OnlyForms` makes anything else that a launch asks of a tensor an error.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch.overrides import TorchFunctionMode

ALIGNMENT = 512  # bytes, as PyTorch's allocator for CUDA devices aligns
STATED = {"enable_fp_fusion": True}
"""What no launch leaves to Triton's default: 3.9 warns where this is left open, and 3.10 is to take the other way."""

Tensors = Sequence[Any]  # those of a call, `None` for an optional one that was not given


class TensorForm(NamedTuple):
    """All that launches depend on but the address: Triton compiles other code where it is no multiple of 16."""

    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    device: torch.device
    misalignment: int  # bytes from the last multiple of 16


def form_of(x: torch.Tensor) -> TensorForm:
    """The form of `x`."""
    return TensorForm(x.dtype, x.shape, x.stride(), x.device, x.data_ptr() % 16)


class OnlyForms(TorchFunctionMode):
    """Within it, asking a tensor for more than its form raises: a recorded launch would repeat the first answer."""

    FORM = frozenset(
        (
            *("__get__", "__getitem__", "__len__", "data_ptr", "dim", "element_size", "numel", "size", "stride"),
            *("storage_offset", "is_contiguous", "detach", "as_strided", "unbind", "view"),
            *("empty", "empty_strided", "new_empty"),
        )
    )

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function.__name__ not in self.FORM:
            raise AssertionError(
                f"A launch asked for {function.__name__} of a tensor, which is not part of what its record is found "
                "by; let it depend on the tensors' forms and the problem alone."
            )
        return function(*args, **kwargs or {})


class Launcher:
    """Where the kernels of one call get their memory, and how they are launched: one by one, as they come."""

    def empty(self, like: torch.Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> torch.Tensor:
        """Memory on the device of `like`, and of its dtype unless told otherwise, until `free` or `free_all`."""
        return like.new_empty(shape, dtype=dtype)

    def slices(self, tensors: Tensors, axis: int, part: slice) -> list[Any]:
        """Some of the heads or tokens of the call's own tensors, of memory from `empty`, or of slices of those."""
        return [None if x is None else x[(slice(None),) * axis + (part,)] for x in tensors]

    def free(self, *tensors: torch.Tensor | None) -> None:
        """What follows may overwrite these."""

    def free_all(self) -> None:
        """What follows may overwrite everything that came from `empty`."""

    def do_not_repeat(self) -> None:
        """The next call of this form shall go the long way, too."""

    def launch(self, kernel: Any, grid: tuple[int, ...], *arguments: object, **options: object) -> None:
        """`kernel[grid](*arguments, **options)`."""
        kernel[grid](*arguments, **(STATED | options))


# These two are plain classes: unpacking named tuples takes several times as long, and a replay must be quick.
class Binding:
    """Which memory an argument of a recorded launch points to."""

    __slots__ = ("argument", "byte_offset", "layout", "tensor")

    def __init__(self, argument: int, tensor: int, byte_offset: int, layout: Any):
        self.argument = argument  # its number
        self.tensor = tensor  # which of the call's tensors or, after those, the workspace
        self.byte_offset = byte_offset
        self.layout = layout  # the tensor or descriptor as it was recorded, without its memory


class RecordedLaunch:
    """One launch: what takes all arguments in the kernel's own order, those, and which of them point to memory."""

    __slots__ = ("arguments", "descriptors", "pointers", "run")

    def __init__(self, run: Callable[..., object], arguments: list[object]):
        self.run = run
        self.arguments = arguments
        self.pointers: list[Binding] = []
        self.descriptors: list[Binding] = []


class Replay:
    """The launches of a call that was recorded, for other tensors of the same forms."""

    def __init__(self, launches: list[RecordedLaunch], workspace_bytes: int, interpreted: bool):
        self.launches = launches
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
        for launch in self.launches:
            arguments = launch.arguments.copy()
            for binding in launch.pointers:
                arguments[binding.argument] = addresses[binding.tensor] + binding.byte_offset
            for binding in launch.descriptors:
                address = _Address(addresses[binding.tensor] + binding.byte_offset)
                arguments[binding.argument] = _moved(binding.layout, address)
            launch.run(*arguments, stream=stream)
        return None

    def _interpret(self, tensors: Tensors) -> None:
        """The same for Triton's interpreter, which wants tensors where a GPU takes addresses."""

        def view(binding: Binding, like: torch.Tensor) -> torch.Tensor:
            whole, offset = tensors[binding.tensor], binding.byte_offset
            if binding.tensor == len(tensors) - 1:  # the workspace
                whole = whole[offset:][: like.nbytes].view(like.dtype)
                return whole.as_strided(like.shape, like.stride())
            first = whole.storage_offset() + offset // like.itemsize
            return whole.as_strided(like.shape, like.stride(), first)

        for launch in self.launches:
            arguments = launch.arguments.copy()
            for binding in launch.pointers:
                arguments[binding.argument] = view(binding, binding.layout)
            for binding in launch.descriptors:
                arguments[binding.argument] = _moved(binding.layout, view(binding, binding.layout.base))
            launch.run(*arguments)


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
    """Launches as `Launcher` does, and notes what a `Replay` needs; `tensors` are the call's own inputs and outputs."""

    def __init__(self, tensors: Tensors):
        # Tensors are told apart by identity: their memory may overlap, where query, key and value are one projection.
        self.tensors = [None if x is None else x.detach() for x in tensors]
        self.workspace = len(self.tensors)
        self.places = {id(x): (index, 0) for index, x in enumerate(self.tensors)}  # number, bytes from its start
        self.views: list[object] = []  # keeps what `places` tells apart alive
        self.allocations: dict[int, tuple[torch.Tensor, int, int]] = {}  # tensor in the workspace, its start and end
        self.workspace_bytes = 0
        self.launches: list[RecordedLaunch] = []
        self.interpreted = False
        self.repeatable = True

    def empty(self, like: torch.Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> torch.Tensor:
        x = super().empty(like, shape, dtype)
        size = -(-max(x.nbytes, 1) // ALIGNMENT) * ALIGNMENT
        start = 0  # the first gap that is wide enough
        for _, taken, end in sorted(self.allocations.values(), key=lambda allocation: allocation[1]):
            if taken - start >= size:
                break
            start = end
        self.allocations[id(x)] = x, start, start + size
        self.workspace_bytes = max(self.workspace_bytes, start + size)
        return x

    def slices(self, tensors: Tensors, axis: int, part: slice) -> list[Any]:
        slices = super().slices(tensors, axis, part)
        for whole, some in zip(tensors, slices, strict=True):
            if whole is not None and some is not None:
                index, offset = self._place(whole)
                self.places[id(some)] = index, offset + some.data_ptr() - whole.data_ptr()
        self.views += slices
        return slices

    def free(self, *tensors: torch.Tensor | None) -> None:
        for x in tensors:
            self.allocations.pop(id(x), None)

    def free_all(self) -> None:
        self.allocations.clear()

    def do_not_repeat(self) -> None:
        self.repeatable = False

    def launch(self, kernel: Any, grid: tuple[int, ...], *arguments: object, **options: object) -> None:
        with torch._C.DisableTorchFunction():  # Triton may ask what it likes
            compiled = kernel[grid](*arguments, **(STATED | options))
        names = kernel.arg_names
        named = dict(zip(names, arguments, strict=False)) | options
        ordered = [named[name] for name in names]
        self.interpreted = not isinstance(kernel, triton.runtime.JITFunction)
        recorded = RecordedLaunch(kernel[grid] if self.interpreted else compiled[(*grid, 1, 1)[:3]], ordered)
        for index, argument in enumerate(ordered):
            if isinstance(argument, torch.Tensor):
                recorded.pointers.append(Binding(index, *self._place(argument), _layout_of(argument)))
                ordered[index] = None
            elif hasattr(argument, "block_shape"):
                layout = _moved(argument, _layout_of(argument.base))
                recorded.descriptors.append(Binding(index, *self._place(argument.base), layout))
                ordered[index] = None
        self.launches.append(recorded)

    def _place(self, x: torch.Tensor) -> tuple[int, int]:
        """Which tensor `x` belongs to, and bytes from there. Memory from `empty` is never shared, so addresses tell."""
        if id(x) in self.places:
            return self.places[id(x)]
        if id(x) in self.allocations:
            return self.workspace, self.allocations[id(x)][1]
        for whole, start, _ in self.allocations.values():
            offset = x.data_ptr() - whole.data_ptr()
            if 0 <= offset < whole.nbytes:
                return self.workspace, start + offset
        raise AssertionError("A kernel was given memory that is neither an argument of the call nor from its workspace")

    def replay(self) -> Replay:
        """What was recorded."""
        return Replay(self.launches, self.workspace_bytes, self.interpreted)


def _layout_of(x: torch.Tensor) -> torch.Tensor:
    """Dtype, shape and strides of a tensor, without its memory."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


class Replays:
    """Replays of the latest kinds of calls, under at most `most` keys."""

    def __init__(self, most: int = 512):
        self.most = most
        self.known: dict[Hashable, Replay] = {}
        self.lock = threading.Lock()

    def run(self, key: Hashable, tensors: Tensors, launch_all: Callable[[Launcher, Tensors], None]) -> None:
        """`launch_all` the first time that `key` is seen; from then on what it did, again for these tensors.

        Args:
            key: everything but the form of `tensors` that decides which kernels are launched, and with which numbers.
            tensors: those that the launches read and write.
            launch_all: takes where to launch, and `tensors`.
        """
        key = (key, *_forms(tensors))
        replay = self.known.get(key)
        if replay is not None:
            return replay.run(tensors)
        recorder = Recorder(tensors)
        with OnlyForms():
            launch_all(recorder, recorder.tensors)
        if not recorder.repeatable:
            return None
        with self.lock:
            while len(self.known) >= self.most and key not in self.known:
                del self.known[next(iter(self.known))]
            self.known[key] = recorder.replay()
        return None

    def clear(self) -> None:
        """Forget everything."""
        self.known.clear()


def _forms(tensors: Tensors) -> list[Hashable]:
    """As `form_of`, in plain tuples, which are quicker to make."""
    return [None if x is None else (x.dtype, x.shape, x.stride(), x.device, x.data_ptr() % 16) for x in tensors]
