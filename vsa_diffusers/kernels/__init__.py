"""The Triton implementation: pool, select, attend."""

from .run import forward, why_not

__all__ = ["forward", "why_not"]
