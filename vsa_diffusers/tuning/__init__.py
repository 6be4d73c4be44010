"""`tune`: the settings of a pipeline that reach a wanted quality at least cost, or a wanted speed at best quality.

Three stages, from cheap to dear:

1. Probe. The transformer's calls at a few steps of a dense run are kept and made again (`replay.py`). In them every
   layer runs the sparse operation beside the dense one at several ratios, and each layer in turn is sparse by itself:
   how much a layer loses, and how much of that reaches the transformer's output (`probe.py`). Blocks and selections
   are compared in the same way.
2. Search. For each of a few schedules, layers share a budget so that the squared errors that the probe predicts add up
   to least (`search.py`). Costs are shares of tiles, or times where they are measured and stable.
3. Confirm. Whole videos of one schedule find about what budget the target takes. There each schedule makes some, and
   so do the best one with all layers alike, since predictions may be wrong, and the default. Of the best some more
   budgets do, until the target is met as nearly as need be (`api.py`). Only whole videos decide.

The videos are made, compared and kept by `vsa_diffusers.comparison`.
"""

from .api import tune
from .result import Point, Tuning
from .target import Target

__all__ = ["Point", "Target", "Tuning", "tune"]
