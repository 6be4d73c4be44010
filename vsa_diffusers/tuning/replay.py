"""The transformer's calls at a few steps of a dense run, made again under other settings.

All settings get the same inputs, those of the dense run, so that their errors are their own and not those of the steps
before; and a call costs a forward instead of a video.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_map

from ..comparison.measure import attending
from ..generation.calling import run_pipeline
from ..inspection.observation import relative_error
from ..inspection.run import spread_steps
from ..pipeline import supported_parts
from ..steps import position_in_run

MOST_DIFFERENT = 0.05
"""The relative difference between a call and its repetition above which it depends on more than its arguments."""


@dataclass(frozen=True)
class Call:
    """One dense call of a transformer.

    Args:
        part: the pipeline's component, such as "transformer".
        step: the denoising step, from 0.
        total: how many steps the run has.
        run: which call of that step: guidance makes two.
        args, kwargs: what it was called with.
        output: its first output, the video's prediction.
    """

    part: str
    step: int
    total: int
    run: int
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: torch.Tensor


def record(
    pipe: Any, arguments: Mapping[str, Any], seed: int, steps: int, on_step: Callable[[], None] | None = None
) -> list[Call]:
    """Run a pipeline densely, without decoding, and keep its transformers' calls at some steps.

    Args:
        pipe: the pipeline.
        arguments: of its call, as `call_arguments` returns them.
        seed: of the noise.
        steps: how many steps, spread evenly from the first to the last.
        on_step: called after each denoising step.

    Raises:
        ValueError: no denoising loop calls a transformer, so that there are no steps.
    """
    calls: list[Call] = []

    def keep(part: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            position = position_in_run()
            if position is None or position.step not in spread_steps(steps, position.total):
                return
            run = sum(call.step == position.step for call in calls)
            args, kwargs = tree_map(_copy, (args, kwargs))
            result = _copy(video_output(output))
            calls.append(Call(part, position.step, position.total, run, args, kwargs, result))

        return hook

    with attending(pipe, None):
        parts = supported_parts(pipe)
        handles = [part.register_forward_hook(keep(name), with_kwargs=True) for name, part in parts.items()]
        try:
            run_pipeline(pipe, arguments, seed, on_step=on_step, output_type="latent")
        finally:
            for handle in handles:
                handle.remove()
    if not calls:
        raise ValueError(
            f"{type(pipe).__name__} calls its transformer outside of a denoising loop; it cannot be tuned."
        )
    return calls


@torch.no_grad()
def replay(parts: Mapping[str, torch.nn.Module], calls: Sequence[Call]) -> Iterator[tuple[Call, torch.Tensor]]:
    """Make the calls again, as the transformers attend now: each call, and its output."""
    # A loop of the form by which the transformers' hooks know the step.
    timesteps = range(calls[0].total)
    for i, t in enumerate(timesteps):
        for call in calls:
            if call.step == t == i:
                args, kwargs = tree_map(_copy, (call.args, call.kwargs))
                yield call, video_output(parts[call.part](*args, **kwargs))


def error_of(parts: Mapping[str, torch.nn.Module], calls: Sequence[Call]) -> float:
    """`||sparse - dense|| / ||dense||` of the transformers' outputs, the root of the mean square over the calls."""
    squares = [relative_error(output, call.output) ** 2 for call, output in replay(parts, calls)]
    return (sum(squares) / len(squares)) ** 0.5


def check_repeatable(call: Call, output: torch.Tensor) -> None:
    """Raise `ValueError` if a dense call, made again, is another one."""
    difference = relative_error(output, call.output)
    if not difference <= MOST_DIFFERENT:
        raise ValueError(
            f"{call.part} gives another output when it is called again with the same arguments (by {difference:.0%}), "
            "as those with a cache do, so that its layers cannot be measured; switch the cache off, or use compare."
        )


def video_output(output: Any) -> torch.Tensor:
    """The first output of a transformer's forward, one row per video, `[videos, ...]`."""
    first = output if isinstance(output, torch.Tensor) else output[0]
    if isinstance(first, (list, tuple)):
        return torch.stack([each.flatten() for each in first])
    return first


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, torch.Tensor) else value
