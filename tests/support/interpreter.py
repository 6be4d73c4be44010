"""What Triton's interpreter needs to be right on bfloat16."""

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def bfloat16_products(setattr_=setattr) -> None:
    """Make products of bfloat16 right: the interpreter keeps it as 16-bit integers, and would multiply those."""

    def wide(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    dot = InterpreterBuilder.create_dot
    setattr_(InterpreterBuilder, "create_dot", lambda self, a, b, *rest: dot(self, wide(a), wide(b), *rest))
