"""The Triton implementation. Forward: pool, select, attend. Backward: the same lists, and their inversion."""

from .backward import backward
from .run import forward, forward_again, why_not

__all__ = ["backward", "forward", "forward_again", "why_not"]
