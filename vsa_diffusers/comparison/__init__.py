"""Dense and sparse videos of the same noise beside each other: what each setting gains, and how close it stays."""

from __future__ import annotations

from .api import Comparison as Comparison
from .api import Result as Result
from .api import compare as compare
from .settings import Setting as Setting

__all__ = ["Comparison", "Result", "Setting", "compare"]
