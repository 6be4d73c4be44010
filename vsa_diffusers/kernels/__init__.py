"""The operation in Triton; `README.md` beside this file is the map."""

from .backward import backward
from .forward import forward
from .support import unsupported_reason

__all__ = ["backward", "forward", "unsupported_reason"]
