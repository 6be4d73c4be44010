"""The Triton implementation: pool, select, attend."""

from .forward import forward, why_not

__all__ = ["forward", "why_not"]
