"""What an inspection found, as numbers and as advice."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..config import VSAConfig
from ..version import __version__
from .observation import CURVE_RATIOS, Layer, Observation

TIMES_MEDIAN = 1.5
LEAST_ERROR = 0.05
LARGE_ERROR = 0.3
MEANS = ("mass", "best_mass", "context_mass", "error", "needed", "needed_by_selection")
RULE = (
    f"A layer asks to stay dense if, in the measured step where it is worst, the relative error of its output is "
    f"above {TIMES_MEDIAN:g} times the median of all layers and above {LEAST_ERROR:.0%}. Keeping one of many layers "
    f"dense costs an equal share of what sparsity saves, whichever layer it is; {TIMES_MEDIAN:g} times the error is "
    f"more than twice the squared error, so such a layer gives back more than twice of what an ordinary one would."
)


@dataclass
class Inspection:
    """What an inspection found.

    Args:
        observations: one of every measured call, in the order of the calls.
        config: what VSA was enabled with.
        query_tiles: how many query tiles were measured in each call.
        query: the chosen token `(t, h, w)`; `None` for the one in the middle.
        model: its name, or the class of its pipeline.
        prompt: of the video.
        call: other arguments of the pipeline's call that are numbers or text.
        frames: of the dense video, uint8 `[frames, height, width, 3]`, where the pipeline returned any.
    """

    observations: list[Observation]
    config: VSAConfig
    query_tiles: int
    query: tuple[int, int, int] | None = None
    model: str = ""
    prompt: str | None = None
    call: dict[str, Any] = field(default_factory=dict)
    frames: np.ndarray | None = None

    @property
    def layers(self) -> list[Layer]:
        """Those that were measured, in the order of the model."""
        parts = list(dict.fromkeys(each.layer.part for each in self.observations))
        found = {each.layer for each in self.observations}
        return sorted(found, key=lambda layer: (parts.index(layer.part), layer.position))

    @property
    def steps(self) -> list[int]:
        """Those in which something was measured."""
        return sorted({each.step for each in self.observations})

    def table(self, what: str) -> np.ndarray:
        """A number of each layer and step, `[layers, steps]`, the mean over the step's runs; NaN where there is none.

        Args:
            what: name of a number of `Observation`, such as "mass" or "error".
        """
        layers, steps = self.layers, self.steps
        values: dict[tuple[int, int], list[float]] = {}
        for each in self.observations:
            values.setdefault((layers.index(each.layer), steps.index(each.step)), []).append(getattr(each, what))
        table = np.full((len(layers), len(steps)), np.nan)
        for place, found in values.items():
            table[place] = np.mean(found)
        return table

    def by_layer(self, what: str) -> np.ndarray:
        """A number of each layer, `[layers]`, or several, `[layers, ...]`: the mean over all its calls."""
        return np.stack(
            [
                np.mean([getattr(each, what) for each in self.observations if each.layer == layer], axis=0)
                for layer in self.layers
            ]
        )

    @property
    def worst_error(self) -> np.ndarray:
        """The error of each layer in that measured step where it is largest, `[layers]`."""
        return np.nanmax(self.table("error"), axis=1)

    @property
    def threshold(self) -> float:
        """The error above which a layer asks to stay dense: see `RULE`."""
        return max(LEAST_ERROR, TIMES_MEDIAN * float(np.median(self.worst_error)))

    @property
    def dense_layers(self) -> list[Layer]:
        """The layers that ask to stay dense, by `RULE`; `enable_vsa(pipe, dense_layers=...)` takes their positions."""
        return [layer for layer, error in zip(self.layers, self.worst_error, strict=True) if error > self.threshold]

    @property
    def advice(self) -> str:
        """In a sentence or two, which layers ask to stay dense, or what to do instead."""
        asking = self.dense_layers
        if asking:
            positions = sorted({layer.position for layer in asking})
            text = f"{_these(positions)} to stay dense: pass dense_layers={tuple(positions)}."
        else:
            text = "No layer asks to stay dense: none is far worse than the others."
        if float(np.median(self.worst_error)) > LARGE_ERROR:
            text += (
                f" Half of the layers are wrong by more than {LARGE_ERROR:.0%} somewhere, which dense layers do not "
                "mend: keep more tiles."
            )
        return text

    def to_dict(self) -> dict[str, Any]:
        """Numbers, text and lists, ready for JSON; the frames are left out."""
        from diffusers import __version__ as diffusers_version
        from torch import __version__ as torch_version

        layers = []
        means = {what: self.by_layer(what) for what in (*MEANS, "curve", "best_curve")}
        asking = self.dense_layers
        for place, layer in enumerate(self.layers):
            values = {what: values[place].tolist() for what, values in means.items()}
            worst = float(self.worst_error[place])
            layers.append(vars(layer) | values | {"worst_error": worst, "asks_to_stay_dense": layer in asking})
        return {
            "model": self.model,
            "prompt": self.prompt,
            "call": self.call,
            "config": self.config.to_dict(),
            "query_tiles": self.query_tiles,
            "query": None if self.query is None else list(self.query),
            "steps": self.steps,
            "curve_ratios": list(CURVE_RATIOS),
            "layers": layers,
            "dense": {"rule": RULE, "threshold": self.threshold, "advice": self.advice},
            "observations": [each.to_dict() for each in self.observations],
            "versions": {"vsa_diffusers": __version__, "torch": torch_version, "diffusers": diffusers_version},
        }


def _these(positions: list[int]) -> str:
    if len(positions) == 1:
        return f"Layer {positions[0]} asks"
    return f"Layers {', '.join(map(str, positions[:-1]))} and {positions[-1]} ask"
