"""What Triton's interpreter needs to be right on bfloat16, to take every mask, and to be faster."""

from dataclasses import replace

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def bfloat16_products(setattr_=setattr) -> None:
    """Make products of bfloat16 right: the interpreter keeps it as 16-bit integers, and would multiply those."""

    def wide(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    dot = InterpreterBuilder.create_dot
    setattr_(InterpreterBuilder, "create_dot", lambda self, a, b, *rest: dot(self, wide(a), wide(b), *rest))


def boolean_masks(setattr_=setattr) -> None:
    """Let Triton 3.9's interpreter take a mask that a scalar was part of: of that it makes whole numbers."""

    def boolean(mask):
        return TensorHandle(mask.data.astype(bool), mask.dtype) if isinstance(mask, TensorHandle) else mask

    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def masked_load(self, ptrs, mask, *rest, **named):
        return load(self, ptrs, boolean(mask), *rest, **named)

    def masked_store(self, ptrs, value, mask, *rest, **named):
        return store(self, ptrs, value, boolean(mask), *rest, **named)

    setattr_(InterpreterBuilder, "create_masked_load", masked_load)
    setattr_(InterpreterBuilder, "create_masked_store", masked_store)


def without_idle_work(setattr_=setattr) -> None:
    """Spare the interpreter half of its time, which changes nothing that it computes.

    A kernel patches Triton's language when it is launched; device functions do it again at each call. NumPy's type
    for each of Triton's is looked up in a table that is made for that. And whether sums overflow is worked out, but
    looked at with `debug` alone, which the interpreter does not set.
    """
    patch = interpreter._patch_lang
    own = [(lang, lang.static_range) for lang in (tl, tl.core)]

    def patch_unless_done(function):
        seen = [id(value) for value in function.__globals__.values()]
        if all(lang.static_range is not unpatched for lang, unpatched in own if id(lang) in seen):
            return interpreter._LangPatchScope()
        return patch(function)

    dtype_of, known = interpreter._get_np_dtype, {}

    def known_dtype_of(kind):
        name = kind.scalar.name
        if name not in known:
            known[name] = dtype_of(kind)
        return known[name]

    setattr_(interpreter, "_get_np_dtype", known_dtype_of)
    builder = interpreter.interpreter_builder
    assert not builder.options.debug
    setattr_(interpreter, "_patch_lang", patch_unless_done)
    setattr_(builder, "options", replace(builder.options, sanitize_overflow=False))
