"""What Gluon calls or compiles otherwise from one release of Triton to another."""

from __future__ import annotations

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import tma

# From Triton 3.7 on the first name.
synchronise = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
# From Triton 3.8 on the first names, and from 3.9 on these alone.
load_box = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
store_box = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
load_rows = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared
_buffer = gl.shared_memory_descriptor
reinterpret = _buffer.reinterpret if hasattr(_buffer, "reinterpret") else _buffer._reinterpret
# From Triton 3.8 on products left running in several loops may get registers for their operands loop by loop.
OPERANDS_APART = gl.constexpr(hasattr(tma, "async_load"))
