"""Gluon's language on the CPU, as far as the Hopper kernel speaks it; Triton's interpreter does not.

Every group of warps of every program is a thread, tensors are PyTorch's, shared memory is laid out as on Hopper. What
the GPU does at a time of its own choosing happens here at the worst one: a copy spoils its target when it is asked for
and fills it some time later, and products and copies to global memory read when they are waited for, not before. So a
kernel that does not wait where it should, or gives a buffer away too early, finds NaN; one that waits for what never
comes is told so, and so is one that loads or stores outside the memory of its tensor.
"""

from __future__ import annotations

import builtins
import math
import random
import threading
import time
import types
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import torch
import triton.language
from triton.experimental.gluon import language as gluon_language
from triton.experimental.gluon.language.nvidia import ampere, hopper

from vsa_diffusers.kernels.hopper import renamed

DEADLOCK_SECONDS = 30.0
LATEST_COPY_SECONDS = 2e-4
here = threading.local()  # the program that a thread belongs to
memory_lock = threading.Lock()


class Program:
    """One program: its number, how many there are, and what went wrong in any of them."""

    def __init__(self, number: int, count: int, errors: list[BaseException], copies: ThreadPoolExecutor):
        self.number, self.count, self.errors, self.copies = number, count, errors, copies

    def thread(self, call: Callable[[], object]) -> threading.Thread:
        """A thread of this program that has been started."""

        def run() -> None:
            here.program = self
            here.writes = []
            try:
                call()
                assert not here.writes, "nobody waits until shared memory has been read"
            except BaseException as error:
                self.errors.append(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        return thread


class Pointer:
    """Addresses in one tensor's storage, counted in its elements."""

    def __init__(self, memory: torch.Tensor, offset: Any):
        self.memory, self.offset = memory, offset
        self.dtype = SimpleNamespace(element_ty=memory.dtype)

    @classmethod
    def to(cls, x: torch.Tensor) -> Pointer:
        elements = x.untyped_storage().nbytes() // x.element_size()
        return cls(x.as_strided((elements,), (1,), 0), torch.tensor(x.storage_offset()))

    def __add__(self, elements: Any) -> Pointer:
        return Pointer(self.memory, self.offset + elements)

    def __sub__(self, elements: Any) -> Pointer:
        return self + -elements


class Shared:
    """A buffer in shared memory: blocks of rows, of which the first 64 columns of all rows come before the others."""

    COLUMNS = 64

    def __init__(self, memory: torch.Tensor, shape: Sequence[int], transposed: bool = False):
        self.memory, self.shape, self.transposed = memory, tuple(shape), transposed
        self.dtype = memory.dtype

    def index(self, number: Any) -> Shared:
        size = math.prod(self.shape[1:])
        return Shared(self.memory[int(number) * size :][:size], self.shape[1:])

    def permute(self, order: tuple[int, int]) -> Shared:
        assert order == (1, 0)
        return Shared(self.memory, self.shape, not self.transposed)

    def reinterpret(self, dtype: torch.dtype, shape: Sequence[int], _layout: object) -> Shared:
        assert dtype == self.dtype
        assert math.prod(shape) == self.memory.numel()
        return Shared(self.memory, shape)

    def _by_columns(self) -> torch.Tensor:
        return self.memory.view(self.shape[-1] // self.COLUMNS, -1, self.COLUMNS)

    def load(self, _layout: object = None) -> torch.Tensor:
        rows = self._by_columns().transpose(0, 1).reshape(self.shape)
        return (rows.mT if self.transposed else rows).clone()

    def store(self, x: torch.Tensor) -> None:
        assert x.dtype == self.dtype
        self._by_columns().copy_(x.reshape(-1, self.shape[-1] // self.COLUMNS, self.COLUMNS).transpose(0, 1))


class Barrier:
    """An mbarrier: a phase ends when everyone expected has arrived and all bytes expected have come."""

    def __init__(self) -> None:
        self.count = self.missing = self.bytes = self.phase = 0
        self.changed = threading.Condition()

    def init(self, count: int) -> None:
        self.count = self.missing = count

    def change(self, arrivals: int = 0, expected_bytes: int = 0) -> None:
        with self.changed:
            self.missing -= arrivals
            self.bytes += expected_bytes
            assert self.missing >= 0, "more have arrived at a barrier than it expects"
            if self.missing == 0 and self.bytes == 0:
                self.phase ^= 1
                self.missing = self.count
                self.changed.notify_all()

    def wait(self, phase: Any) -> None:
        latest = time.monotonic() + DEADLOCK_SECONDS
        with self.changed:
            while self.phase == int(phase):
                self.changed.wait(0.2)
                assert not here.program.errors, "another thread has failed"
                assert time.monotonic() < latest, "a barrier has been waited for in vain"


class Barriers(list):
    index = list.__getitem__


class Product:
    """An asynchronous matrix product, which reads its operands when it is waited for."""

    def __init__(self, a: Any, b: Shared, acc: Any):
        self.a, self.b, self.acc = a, b, acc

    def wait(self) -> torch.Tensor:
        acc = _waited(self.acc)
        a = self.a.load() if isinstance(self.a, Shared) else self.a
        return acc + a.float() @ self.b.load().float()


def _waited(x: Any) -> Any:
    return x.wait() if isinstance(x, Product) else x


def _wait_for_products(left: int, deps: Sequence[Any]) -> tuple[Any, ...]:
    assert left == 0
    return tuple(_waited(x) for x in deps)


def _multiply(a: Any, b: Shared, acc: Any, use_acc: bool = True, is_async: bool = False) -> Product:
    assert is_async
    return Product(a, b, acc if use_acc else 0.0)


def _tensor(x: Any) -> torch.Tensor:
    return x if isinstance(x, torch.Tensor) else torch.tensor(x, dtype=torch.int32 if isinstance(x, int) else None)


def _within(at: Pointer, mask: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Which elements are meant, and their offsets, 0 for the others; none may lie outside the memory."""
    mask, offset = torch.broadcast_tensors(_tensor(True if mask is None else mask).bool(), _tensor(at.offset).long())
    offset = torch.where(mask, offset, 0)
    assert 0 <= offset.min() <= offset.max() < at.memory.numel(), "an address outside the tensor's memory"
    return mask, offset


def _load(at: Pointer, mask: Any = None, other: Any = None, volatile: bool = False) -> torch.Tensor:
    if volatile:
        assert not here.program.errors, "another thread has failed"
        time.sleep(1e-4)
    exists, offset = _within(at, mask)
    values = at.memory.take(offset)
    if mask is None:
        return values
    return torch.where(exists, values, torch.full_like(values, float("nan") if other is None else other))


def _store(at: Pointer, value: Any, mask: Any = None) -> None:
    mask, offset, values = torch.broadcast_tensors(*_within(at, mask), _tensor(value).to(at.memory.dtype))
    at.memory[offset[mask]] = values[mask]


def _atomic_add(at: Pointer, value: int, sem: str) -> None:
    assert sem == "relaxed"
    with memory_lock:
        at.memory[int(at.offset)] += value


def _later(target: Shared, values: Callable[[], torch.Tensor], done: Callable[[], None]) -> None:
    """Spoil the target now, and fill it at some time."""
    target.memory.fill_(float("nan"))
    program = here.program

    def copy() -> None:
        try:
            time.sleep(random.uniform(0, LATEST_COPY_SECONDS))
            target.store(values().to(target.dtype))
            done()
        except BaseException as error:
            program.errors.append(error)

    program.copies.submit(copy)


def _box(descriptor: Any, corner: Sequence[Any], shared: Shared) -> tuple[Pointer, torch.Tensor]:
    """Where the elements of a box lie, and which of them exist."""
    base, corner = Pointer.to(descriptor.base), [int(x) for x in corner]
    assert list(shared.shape) == list(descriptor.block_shape)
    exists, offset = torch.tensor(True), torch.tensor(0)
    for axis, (first, side) in enumerate(zip(corner, descriptor.block_shape, strict=True)):
        place = (first + torch.arange(side)).view(-1, *[1] * (len(corner) - axis - 1))
        exists = exists & (place >= 0) & (place < descriptor.shape[axis])
        offset = offset + place * descriptor.strides[axis]
    return base + offset, exists


def _copy_box(descriptor: Any, corner: Sequence[Any], barrier: Barrier, target: Shared) -> None:
    at, exists = _box(descriptor, corner, target)
    size = target.memory.nbytes
    _later(target, lambda: _load(at, exists, 0.0), lambda: barrier.change(0, -size))


def _write_box(descriptor: Any, corner: Sequence[Any], source: Shared) -> None:
    """The other way; the source is read as late as can be, when somebody waits for it."""
    at, exists = _box(descriptor, corner, source)
    here.writes.append(lambda: _store(at, source.load(), exists))


def _await_writes(*_: object, **__: object) -> None:
    for write in here.writes:
        write()
    here.writes.clear()


def _instruction(assembly: str, constraints: str, arguments: Sequence[Any], *_: object, **__: object) -> Any:
    if assembly.startswith("mov.b32"):
        return arguments[0]
    assert assembly.startswith("cp.async.bulk.wait_group 0;"), f"not spoken here: {assembly}"
    return _await_writes()


def _copy_rows(target: Shared, at: Pointer, mask: torch.Tensor) -> None:
    """A copy without a barrier of its own: it counts for the one that `_arrive_with_rows` is told."""
    here.rows = target, at, mask


def _arrive_with_rows(barrier: Barrier) -> None:
    target, at, mask = here.rows
    barrier.change(-1)  # one more is expected, and arrives with the copy
    _later(target, lambda: _load(at, mask, 0.0), lambda: barrier.change(1))


def _allocate(dtype: torch.dtype, shape: Sequence[int], _layout: object) -> Any:
    if dtype == torch.int64:
        return Barriers(Barrier() for _ in builtins.range(shape[0])) if len(shape) == 2 else Barrier()
    return Shared(torch.full((math.prod(shape),), float("nan"), dtype=dtype), shape)


def _specialise(
    partitions: Sequence[tuple[Callable[..., None], tuple]], warps: list[int], registers: list[int]
) -> None:
    assert len(partitions) == len(warps) + 1 == len(registers) + 1
    threads = [here.program.thread(lambda call=call, given=given: call(*given)) for call, given in partitions[1:]]
    first, given = partitions[0]
    first(*given)
    for thread in threads:
        thread.join()


def _range(*bounds: Any):
    """Numbers that loops count are tensors in Triton."""
    return (torch.tensor(number, dtype=torch.int32) for number in builtins.range(*[int(bound) for bound in bounds]))


def _nothing(*_: object, **__: object) -> None:
    pass


LANGUAGE = SimpleNamespace(
    int32=torch.int32,
    int64=torch.int64,
    float32=torch.float32,
    static_range=builtins.range,
    program_id=lambda axis: torch.tensor(here.program.number, dtype=torch.int32),
    num_programs=lambda axis: torch.tensor(here.program.count, dtype=torch.int32),
    allocate_shared_memory=_allocate,
    warp_specialize=_specialise,
    load=_load,
    store=_store,
    atomic_add=_atomic_add,
    cast=lambda x, dtype: _tensor(x).to(dtype),
    to_tensor=_tensor,
    convert_layout=lambda x, layout: x,
    arange=lambda first, last, layout=None: torch.arange(first, last, dtype=torch.int32),
    zeros=lambda shape, dtype, layout=None: torch.zeros(shape, dtype=dtype),
    full=lambda shape, value, dtype, layout=None: torch.full(shape, value, dtype=dtype),
    zeros_like=torch.zeros_like,
    inline_asm_elementwise=_instruction,
    where=lambda mask, x, y: torch.where(_tensor(mask), _tensor(x), _tensor(y)),
    minimum=lambda x, y: torch.minimum(_tensor(x), _tensor(y)),
    maximum=lambda x, y: torch.maximum(_tensor(x), _tensor(y)),
    cdiv=lambda x, y: -(-x // y),
    abs=torch.abs,
    exp2=torch.exp2,
    log2=torch.log2,
    fma=lambda x, y, z: x * y + z,
    sum=lambda x, axis: x.sum(axis),
    max=lambda x, axis: x.amax(axis),
    SliceLayout=_nothing,
    BlockedLayout=_nothing,
    DotOperandLayout=_nothing,
)
MBARRIER = SimpleNamespace(
    MBarrierLayout=_nothing,
    init=lambda barrier, count: barrier.init(count),
    wait=lambda barrier, phase: barrier.wait(phase),
    arrive=lambda barrier: barrier.change(1),
    expect=lambda barrier, size: barrier.change(1, size),
)
TMA = SimpleNamespace(store_wait=_await_writes)
STANDING_IN: dict[int, Any] = {
    id(gluon_language): LANGUAGE,
    id(triton.language): LANGUAGE,
    id(hopper.mbarrier): MBARRIER,
    id(hopper.tma): TMA,
    id(ampere.async_copy): SimpleNamespace(mbarrier_arrive=_arrive_with_rows),
    id(hopper.fence_async_shared): _nothing,
    id(hopper.warpgroup_mma): _multiply,
    id(hopper.warpgroup_mma_init): lambda acc: acc,
    id(hopper.warpgroup_mma_wait): _wait_for_products,
    id(renamed.synchronise): _nothing,
    id(renamed.reinterpret): Shared.reinterpret,
    id(renamed.load_box): _copy_box,
    id(renamed.store_box): _write_box,
    id(renamed.load_rows): _copy_rows,
}
_modules: dict[int, dict[str, Any]] = {}


def _translated(function: Callable[..., Any]) -> Callable[..., Any]:
    """The Python function of a kernel, with this module's names in place of Gluon's."""
    names = function.__globals__
    if id(names) not in _modules:
        ours = _modules[id(names)] = {"__builtins__": builtins.__dict__, "range": _range}
        ours |= {name: _stand_in(value) for name, value in names.items() if not name.startswith("__")}
    copy = types.FunctionType(function.__code__, _modules[id(names)], function.__name__, function.__defaults__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _stand_in(value: Any) -> Any:
    if id(value) in STANDING_IN:
        return STANDING_IN[id(value)]
    if isinstance(value, triton.language.constexpr):
        return value.value
    if isinstance(value, triton.runtime.jit.ConstexprFunction):  # they choose layouts
        return _nothing
    if callable(getattr(value, "fn", None)):
        return _translated(value.fn)
    return value


def run(kernel: Any, programs: int, arguments: Sequence[Any], options: dict[str, Any]) -> None:
    """`kernel[(programs,)](*arguments, **options)`; all programs run at once."""
    function = _translated(kernel.fn)
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    given = dict(zip(names, arguments, strict=False)) | options
    constants = {name for name, kind in kernel.fn.__annotations__.items() if "constexpr" in str(kind)}

    def argument(name: str) -> Any:
        value = given[name]
        if name in constants or value is None:
            return value
        if isinstance(value, torch.Tensor):
            return Pointer.to(value)
        return _tensor(value) if isinstance(value, (int, float)) else value

    values = [argument(name) for name in names]
    errors: list[BaseException] = []
    with ThreadPoolExecutor(4) as copies:
        crowd = [Program(number, programs, errors, copies) for number in builtins.range(programs)]
        for thread in [program.thread(lambda: function(*values)) for program in crowd]:
            thread.join()
    if errors:
        raise errors[0]
