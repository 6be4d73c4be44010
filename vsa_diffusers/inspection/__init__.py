"""What sparse attention keeps and loses in a model's layers: `inspect_attention(pipe, prompt, 0.2)`."""

from __future__ import annotations

from .observation import CURVE_RATIOS, Layer, Observation, QueryTile
from .result import Inspection
from .run import inspect_attention, observed_attention

__all__ = [
    "CURVE_RATIOS",
    "Inspection",
    "Layer",
    "Observation",
    "QueryTile",
    "inspect_attention",
    "observed_attention",
]
