"""The Triton implementation. Forward: pool, select, attend. Backward: the same lists, and their inversion."""

from .backward import backward
from .forward import forward
from .launch import repeat_forward
from .support import unsupported_reason

__all__ = ["backward", "forward", "repeat_forward", "unsupported_reason"]
