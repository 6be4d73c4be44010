"""The operation in Triton; `README.md` beside this file is the map."""

from .backward import backward
from .forward import forward
from .launch import repeat_forward
from .support import unsupported_reason

__all__ = ["backward", "forward", "repeat_forward", "unsupported_reason"]
