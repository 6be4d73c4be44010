"""A tuning of a model that is loaded for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..extras import REPORTS, check_installed
from ..files import PathLike, check_destination
from ..generation.calling import calls_by_prompt
from ..generation.loading import check_place, load_pipeline, pipeline_class, place, recommended_call
from ..generation.progress import Progress
from ..selection import SELECTIONS
from .api import BLOCKS, check_choices, tune
from .result import Tuning
from .search import SHAPES
from .target import TARGETS, Target


def tune_model(
    model: PathLike,
    prompts: Sequence[str],
    directory: PathLike,
    *,
    arguments: Mapping[str, Any] | None = None,
    seed: int | None = None,
    dtype: str | None = None,
    device: str | None = None,
    offload: str = "none",
    lora: PathLike | None = None,
    progress: Progress | None = None,
    **more: Any,
) -> Tuning:
    """Load a pipeline and `tune` it.

    Args:
        model, dtype, device, lora: as in `load_pipeline`.
        prompts, directory, progress: as in `tune`.
        arguments: of the pipeline's call; what is `None` is left to `recommended_call` and to the pipeline.
        seed: of the noise; `None` takes the recommended one, else 0.
        offload: as in `place`.
        more: further arguments of `tune`.

    Raises:
        What `tune`, `load_pipeline` and `place` raise.
    """
    check_installed(*REPORTS)
    check_destination(directory, directory=True)
    check_place(device, offload)
    Target.one_of({name: more.get(name) for name in TARGETS})
    check_choices(
        prompts, more.get("blocks", BLOCKS), more.get("selections", SELECTIONS), more.get("schedules", tuple(SHAPES)),
        more.get("rounds", 0),
    )  # fmt: skip
    recommended, usual_seed = recommended_call(model)
    recommended.pop("prompt", None)
    wanted = recommended | {name: value for name, value in (arguments or {}).items() if value is not None}
    cls = pipeline_class(model)
    if cls is not None:  # refused before loading rather than after
        calls_by_prompt(cls, prompts, wanted)
    progress = progress or Progress()
    progress.begin("loading", None)
    pipe = load_pipeline(model, dtype=dtype, device=device, lora=lora)
    place(pipe, device, offload)
    return tune(
        pipe, prompts, directory, arguments=wanted, seed=usual_seed if seed is None else seed, progress=progress, **more
    )
