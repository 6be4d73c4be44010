"""The Triton implementation. Forward: pool, select, attend. Backward: the same lists, and their inversion."""

from .backward import backward
from .forward import forward
from .launch import forward_again
from .support import why_not

__all__ = ["backward", "forward", "forward_again", "why_not"]
