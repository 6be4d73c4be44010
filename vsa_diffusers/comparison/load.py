"""A comparison of a model that is loaded for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..config import VSAConfig
from ..extras import REPORTS, check_installed
from ..files import PathLike, check_destination
from ..generation.calling import calls_by_prompt
from ..generation.loading import check_place, compile_blocks, load_pipeline, pipeline_class, place, recommended_call
from ..generation.progress import Progress
from .api import Comparison, compare
from .settings import as_setting, check_names, read_setting


def compare_model(
    model: PathLike,
    prompts: Sequence[str],
    directory: PathLike,
    *,
    ratios: Sequence[float] = (),
    settings: Sequence[str] = (),
    changes: Mapping[str, Any] | None = None,
    arguments: Mapping[str, Any] | None = None,
    seed: int | None = None,
    fps: float | None = None,
    dtype: str | None = None,
    device: str | None = None,
    offload: str = "none",
    compile: bool = False,
    lora: PathLike | None = None,
    gates: PathLike | None = None,
    reuse: bool = True,
    progress: Progress | None = None,
    command: str | None = None,
) -> Comparison:
    """Load a pipeline and `compare` its videos.

    Args:
        model, dtype, device, lora, gates: as in `load_pipeline`.
        prompts, directory, fps, reuse, progress, command: as in `compare`.
        ratios: each a setting of this `top_k_ratio` and of the fields in `changes`.
        settings: more of them, as text that `read_setting` takes.
        changes: fields of `VSAConfig` that all ratios share.
        arguments: of the pipeline's call; what is `None` is left to `recommended_call` and to the pipeline.
        seed: of the noise; `None` takes the recommended one, else 0.
        offload: as in `place`.
        compile: compile the transformer's blocks.

    Raises:
        What `compare`, `load_pipeline` and `place` raise.
    """
    check_installed(*REPORTS)
    check_destination(directory, directory=True)
    check_place(device, offload)
    everything = [as_setting(VSAConfig(top_k_ratio=ratio, **(changes or {}))) for ratio in ratios]
    everything += [read_setting(text) for text in settings]
    check_names(everything)
    recommended, usual_seed = recommended_call(model)
    recommended.pop("prompt", None)
    seed = usual_seed if seed is None else seed
    wanted = recommended | {name: value for name, value in (arguments or {}).items() if value is not None}
    cls = pipeline_class(model)
    if cls is not None:  # refused before loading rather than after
        calls_by_prompt(cls, prompts, wanted)
    progress = progress or Progress()
    progress.begin("loading", None)
    pipe = load_pipeline(model, dtype=dtype, device=device, lora=lora, gates=gates)
    place(pipe, device, offload)
    if compile:
        compile_blocks(pipe)
    return compare(
        pipe, prompts, everything, directory, arguments=wanted, seed=seed, fps=fps, reuse=reuse, progress=progress,
        command=command,
    )  # fmt: skip
