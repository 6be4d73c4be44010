"""Settings to begin with, by family and size: `enable_vsa(pipe, recipe="balanced")`."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")
NAMES = ("quality", "balanced", "fast")
SMALL, LARGE = "small", "large"
MANY_TOKENS = 256 * 64
"""From so many tokens on a grid is large. Below, a whole transformer of 96 whole tiles gained 7 % at 0.2 on an H100;
above, those of 274 and more gained 37 % and more."""


@dataclass(frozen=True)
class Recipe:
    """Fields of `VSAConfig`, and where they come from.

    The block is left to `enable_vsa`: the one that fits the video with "merge", (4, 4, 4) with gates.

    Args:
        top_k_ratio, dense_steps, dense_layers: as in `enable_vsa`.
        source: what they rest on: "measured" on which model, or "advice".
    """

    top_k_ratio: float
    dense_steps: int | float
    dense_layers: tuple[int, ...]
    source: str

    def settings(self) -> dict[str, Any]:
        """The arguments of `enable_vsa` that it stands for."""
        return {
            "top_k_ratio": self.top_k_ratio,
            "dense_steps": self.dense_steps,
            "dense_layers": self.dense_layers,
            "schedule": "constant",  # after the dense steps, as it was measured
        }


_TINY = "measured: the tiny Wan model of this repository"
_BY_TILES = "advice: as for small grids, at a lower ratio, since more tiles to choose from are chosen better"
_FEW = "advice: few-step models want more dense steps and at least 0.15 of the keys"
_FIRST = (0,)

# By size and name, for all families but those below.
_GENERAL: Mapping[str, Mapping[str, Recipe]] = {
    SMALL: {
        "quality": Recipe(0.5, 0.2, _FIRST, "advice: between dense and what was measured at 0.25"),
        "balanced": Recipe(0.25, 0.2, _FIRST, f"{_TINY}, PSNR to dense 31.6 dB"),
        "fast": Recipe(0.125, 0.2, _FIRST, f"{_TINY}, PSNR to dense 22.9 dB"),
    },
    LARGE: {
        "quality": Recipe(0.3, 0.2, _FIRST, _BY_TILES),
        "balanced": Recipe(0.2, 0.2, _FIRST, _BY_TILES),
        "fast": Recipe(0.1, 0.2, _FIRST, _BY_TILES),
    },
}
_FEW_STEPS: Mapping[str, Mapping[str, Recipe]] = {
    SMALL: {
        "quality": Recipe(0.5, 0.25, _FIRST, _FEW),
        "balanced": Recipe(0.3, 0.25, _FIRST, _FEW),
        "fast": Recipe(0.2, 0.25, _FIRST, _FEW),
    },
    LARGE: {
        "quality": Recipe(0.4, 0.25, _FIRST, _FEW),
        "balanced": Recipe(0.25, 0.25, _FIRST, _FEW),
        "fast": Recipe(0.15, 0.25, _FIRST, _FEW),
    },
}
_BY_FAMILY: Mapping[str, Mapping[str, Mapping[str, Recipe]]] = {"AnyFlow": _FEW_STEPS, "Kandinsky 6": _FEW_STEPS}


def size_class(tokens: int) -> str:
    """ "small" or "large", by the number of video tokens."""
    return LARGE if tokens >= MANY_TOKENS else SMALL


def recipe_of(family: str, size: str, name: str) -> Recipe:
    """The recipe of this name for a family (`Family.name`) and a size ("small", "large").

    Raises:
        ValueError: there is none of this name.
    """
    if name not in NAMES:
        raise ValueError(f"recipe={name!r} must be one of {', '.join(map(repr, NAMES))}.")
    return _BY_FAMILY.get(family, _GENERAL)[size][name]


# Families whose usual videos have fewer than MANY_TOKENS tokens; `planning` knows the sizes.
_USUALLY_SMALL = ("ChronoEdit", "EasyAnimate", "Helios", "LTX-2", "LTX-Video", "Mochi")


def usual_size_class(family: str) -> str:
    """The size of a family's usual videos."""
    return SMALL if family in _USUALLY_SMALL else LARGE


def recipe_settings(families: Sequence[str], name: str, video_shape: Sequence[int] | None = None) -> dict[str, Any]:
    """What `enable_vsa(recipe=name)` sets: by the size of `video_shape` if it is given, else by the families' usual.

    Raises:
        ValueError: there is no such recipe.
    """
    size = usual_size_class(families[0]) if video_shape is None else size_class(math.prod(video_shape))
    return recipe_of(families[0], size, name).settings()


def with_recipes(
    families_of: Callable[[Any], Sequence[str]],
) -> Callable[[Callable[Parameters, Result]], Callable[Parameters, Result]]:
    """Let a function take `recipe=`, whose settings stand in for the arguments that its caller leaves out.

    Args:
        families_of: the names of the families in the function's first argument.
    """

    def decorate(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def call(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
            name = kwargs.get("recipe")
            if name is None:
                return function(*args, **kwargs)
            given = signature.bind(*args, **kwargs).arguments
            if given.get("config") is not None:
                raise ValueError(
                    f"recipe={name!r} was given together with config=, which holds all settings; pass one of them."
                )
            families = families_of(next(iter(given.values())))
            settings = recipe_settings(families, str(name), given.get("video_shape"))
            schedule = given.get("schedule", "auto")
            if given.get("top_k") is not None or not isinstance(schedule, str):
                del settings["top_k_ratio"]
            if schedule != "auto":
                del settings["schedule"]
            if schedule not in ("auto", "constant"):  # it says itself when tiles are spent
                del settings["dense_steps"]
            left_out: Any = {key: value for key, value in settings.items() if key not in given}
            return function(*args, **kwargs, **left_out)

        return call

    return decorate
