"""Inspect a model by its name: load it, and write what was found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..config import VSAConfig, make_config
from ..extras import check_installed
from ..files import PathLike, check_destination
from ..generation.calling import call_arguments, number_of_steps, tells_steps
from ..generation.loading import check_place, load_pipeline, pipeline_class, place, recommended_call
from ..generation.progress import Progress
from .report import PACKAGES, write_inspection
from .result import Inspection
from .run import DEFAULT_QUERY_TILES, DEFAULT_RATIO, DEFAULT_STEPS, inspect_attention


def inspect_model(
    model: PathLike,
    prompt: str,
    output: PathLike,
    *,
    changes: Mapping[str, Any] | None = None,
    layers: Sequence[int] | None = None,
    steps: int | Sequence[int] = DEFAULT_STEPS,
    query: Sequence[int] | None = None,
    query_tiles: int = DEFAULT_QUERY_TILES,
    arguments: Mapping[str, Any] | None = None,
    seed: int | None = None,
    dtype: str | None = None,
    device: str | None = None,
    offload: str = "none",
    lora: PathLike | None = None,
    gates: PathLike | None = None,
    command: str | None = None,
    progress: Progress | None = None,
) -> Inspection:
    """Load a pipeline, inspect it, and write pictures, numbers and a page.

    Args:
        model, dtype, device, lora, gates: as in `load_pipeline`.
        prompt: of the video.
        output: a directory, as in `write_inspection`.
        changes: fields of `VSAConfig`.
        layers, steps, query, query_tiles: as in `inspect_attention`.
        arguments: of the pipeline's call, as in `call_arguments`; what is `None` is left to the model.
        seed: of the noise; `None` takes the recommended one, else 0.
        offload: as in `place`.
        command: what the page says that it was made with.
        progress: told of the denoising steps.

    Raises:
        ValueError, TypeError, OSError, ImportError: an argument or a file is wrong; nothing is written then.
    """
    progress = progress or Progress()
    check_destination(output, directory=True)
    check_installed(*PACKAGES)
    check_place(device, offload)
    config = make_config(VSAConfig(top_k_ratio=DEFAULT_RATIO), changes or {})
    recommended, usual_seed = recommended_call(model)
    given = {name: value for name, value in (arguments or {}).items() if value is not None}
    wanted = recommended | given | {"prompt": prompt}
    cls = pipeline_class(model)
    if cls is not None:  # refused before loading rather than after
        call_arguments(cls, **wanted)
    progress.begin("loading", None)
    pipe = load_pipeline(model, dtype=dtype, device=device, lora=lora, gates=gates)
    call = call_arguments(pipe, **wanted)
    place(pipe, device, offload)
    progress.begin("denoising", number_of_steps(pipe, call) if tells_steps(pipe) else None)

    def on_step(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        progress.step()
        return tensors

    told = {"callback_on_step_end": on_step} if tells_steps(pipe) else {}
    inspection = inspect_attention(
        pipe,
        config=config,
        layers=layers,
        steps=steps,
        query=query,
        query_tiles=query_tiles,
        seed=usual_seed if seed is None else seed,
        **call | told | {"output_type": "np"},
    )
    inspection.model = str(model)
    write_inspection(inspection, output, command)
    return inspection
