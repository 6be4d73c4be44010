"""How much each layer loses at each ratio, and how much of that reaches the transformer's output."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from ..comparison.api import facts_of
from ..config import VSAConfig
from ..generation.progress import Progress
from ..inspection.observation import dense_output, relative_error
from ..operators import forward
from ..pipeline import install_vsa, supported_parts, vsa_unchanged
from ..problem import Problem
from ..processor import FamilyAttnProcessor
from ..steps import position_in_run
from ..tiles import TileGrid, num_selected_tiles, settle
from .replay import Call, check_repeatable, replay
from .state import State

RATIOS = (0.05, 0.1, 0.2, 0.4, 0.7)
"""At which layers are measured; all tiles are no error."""
REFERENCE = 0.2
"""The ratio at which blocks and selections are compared, and each layer is sparse by itself."""
STEPS = 4
"""Of a run, spread evenly, that are measured."""
REPETITIONS = 3

Block = tuple[int, int, int] | str


@dataclass(frozen=True)
class Tiling:
    """A block and a selection, and what they cost and lose at `REFERENCE`.

    Args:
        block: as `VSAConfig.block_size`.
        selection: as `VSAConfig.selection`.
        error: root of the mean square error of the layers' outputs.
        share: tokens of kept tiles, padding included, over all tokens.
    """

    block: Block
    selection: str
    error: float
    share: float


@dataclass(frozen=True)
class Probe:
    """What was measured of the layers of one dense run or several.

    Args:
        layers: names of the video self-attention modules that can be sparse, in order.
        steps: the steps that were measured.
        total: of a run.
        tiles: of the video.
        default_tiles: of the video by the block that is the default.
        tiling: the block and selection that were measured.
        errors: `||sparse - dense|| / ||dense||` of each layer's output, `[layers, steps, ratios]`.
        gains: error of the transformer's output for each error of a layer's, `[layers, steps]`.
        times: seconds of a layer, the median, by ratio, and of a dense one as ratio 0; empty if not measured.
        spread: the largest interquartile range of these times over their median.
        rest: seconds of the forward that are not attention.
    """

    layers: tuple[str, ...]
    steps: tuple[int, ...]
    total: int
    tiles: int
    default_tiles: int
    tiling: Tiling
    errors: np.ndarray
    gains: np.ndarray
    times: Mapping[float, float]
    spread: float
    rest: float

    def share(self, ratio: float) -> float:
        """Share of the tiles that a ratio keeps, in whole tiles."""
        return num_selected_tiles(self.tiles, ratio) / self.tiles

    def output_error(self, shares: np.ndarray) -> np.ndarray:
        """The error of the transformer's output that each layer alone makes.

        Args:
            shares: of the tiles that are kept at every step, `[total]`; 1 is no error.

        Returns:
            `[layers, total]`. Between shares and steps that were measured it is interpolated; below the least share it
            goes on as it rises there.
        """
        grid, first = np.unique([1.0, *map(self.share, RATIOS)], return_index=True)  # few tiles: some are the same
        errors = np.concatenate([np.zeros((*self.errors.shape[:2], 1)), self.errors], axis=-1)[..., first]
        if len(grid) > 1:
            rise = (errors[..., :1] - errors[..., 1:2]).clip(min=0) / (grid[1] - grid[0])
            grid, errors = np.array([0.0, *grid]), np.concatenate([errors[..., :1] + grid[0] * rise, errors], axis=-1)
        scaled = errors * self.gains[..., None]
        steps = np.arange(self.total)
        found = np.empty((len(self.layers), self.total))
        for place, of_layer in enumerate(scaled):
            at_share = np.stack([np.interp(steps, self.steps, of_layer[:, each]) for each in range(len(grid))], axis=-1)
            found[place] = [np.interp(share, grid, row) for share, row in zip(shares, at_share, strict=True)]
        return found


def probe(
    pipe: Any,
    calls: Callable[[], Sequence[Sequence[Call]]],
    blocks: Sequence[Block],
    selections: Sequence[str],
    state: State,
    with_times: bool,
    progress: Progress,
) -> Probe:
    """Measure a pipeline's layers on calls of dense runs; what `state` has of it is not measured again.

    Args:
        pipe: the pipeline, not compiled.
        calls: makes or has those calls, by prompt; called only if there is something to measure.
        blocks, selections: from which the tiling of least error for its share is taken.
        state: keeps what is measured.
        with_times: time the layers, too.
        progress: told of what is measured.

    Raises:
        ValueError: no layer can be sparse, or the transformers cannot be called again.
    """
    parts = supported_parts(pipe)
    found = state.once(
        f"tilings of {list(blocks)} {list(selections)}",
        lambda: _tilings(parts, calls()[0], blocks, selections, progress),
    )
    tiling = best_tiling([Tiling(_block(each[0]), *each[1:]) for each in found["tilings"]])
    name = f"{tiling.block} {tiling.selection}"
    layers = state.once(f"layers {name}", lambda: _layers(parts, calls(), tiling, progress))
    steps, errors = layers["steps"], np.array(layers["errors"])
    reference = RATIOS.index(REFERENCE)
    gains = np.zeros(errors.shape[:2])
    for place, layer in enumerate(layers["names"]):
        alone = state.once(f"alone {name} {layer}", partial(_alone, parts, calls, tiling, layer, progress))
        gains[place] = np.array(alone) / np.maximum(errors[place, :, reference], 1e-9)
    times: dict[str, Any] = {"of": {}, "spread": 0.0, "rest": 0.0}
    if with_times:
        hardware = facts_of(pipe)["hardware"]  # errors are the same on others, times are not
        times = state.once(f"times {name} on {hardware}", lambda: _times(parts, calls()[0], tiling, progress))
    return Probe(
        tuple(layers["names"]),
        tuple(steps),
        layers["total"],
        layers["tiles"],
        found["default_tiles"],
        tiling,
        errors,
        gains,
        {float(ratio): seconds for ratio, seconds in times["of"].items()},
        times["spread"],
        times["rest"],
    )


def check_without_gates(pipe: Any) -> None:
    """Raise `ValueError` where gates are trained: dense attention, without them, is another model."""
    parts = supported_parts(pipe)
    with vsa_unchanged(list(parts.values())):
        for part, transformer in parts.items():
            gated = [name for name, each in install_vsa(transformer, VSAConfig(), part).items() if each.keeps_coarse]
            if gated:
                raise ValueError(
                    f"{part} has trained gates ({gated[0]}), which were trained for one ratio and block, and dense "
                    "attention without them is another model; use what they were trained for, and do not tune them."
                )


def best_tiling(tilings: Sequence[Tiling]) -> Tiling:
    """The one of least error, as if error fell with the share: padding of tiles that do not fit counts against it."""
    return min(tilings, key=lambda each: each.error * each.share)


class OpCall(NamedTuple):
    """One call of the operation, as `operators.forward` takes it."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    gate: torch.Tensor | None
    context_mask: torch.Tensor | None
    problem: Problem
    implementation: str

    def at(self, ratio: float) -> OpCall:
        """The same at another ratio."""
        return self._replace(
            problem=replace(self.problem, top_k=num_selected_tiles(self.problem.grid.num_tiles, ratio))
        )

    def error(self, dense: torch.Tensor) -> float:
        """`||sparse - dense|| / ||dense||` of the output at the video's tokens."""
        video = self.problem.video
        return relative_error(forward(*self)[0][:, video], dense[:, video])


class _Watch:
    """Stands in for the operation in one module: passes its calls on, and returns the dense result."""

    def __init__(self, processor: FamilyAttnProcessor, look: Callable[..., None], count: list[int]):
        self.processor = processor
        self.look = look
        self.count = count

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, video_shape: Any, **given: Any
    ) -> Any:
        block, kept = settle(video_shape, given["block_size"], given.get("top_k_ratio", 0.5), given.get("top_k"))
        scale = query.shape[-1] ** -0.5
        before, after = given["context_tokens"]
        grid = TileGrid(video_shape, block)
        problem = Problem(grid, kept, given["combine"], scale, before, after, given["selection"])
        gate = given["gate"] if given["gate"] is None else given["gate"].to(query.dtype)
        call = OpCall(query, key, value, gate, given["context_mask"], problem, given["implementation"])
        dense = dense_output(*call)
        self.count[0] += 1
        self.look(self.processor.name, call, dense)
        return dense


def _watched(
    parts: Mapping[str, torch.nn.Module],
    calls: Sequence[Call],
    config: VSAConfig,
    look: Callable[[str, OpCall, torch.Tensor], None],
    progress: Progress,
) -> None:
    """Make the calls densely, and have `look` see every layer's call of the operation, with its dense result."""
    count = [0]
    with vsa_unchanged(list(parts.values())):
        for part, transformer in parts.items():
            for processor in install_vsa(transformer, config, part).values():
                if processor.exchange is not None:
                    raise ValueError(f"{part} is spread over several ranks; tune it on one GPU.")
                processor.operation = _Watch(processor, look, count)
        for call, output in replay(parts, calls):
            check_repeatable(call, output)
            progress.step()
    if not count[0]:
        raise ValueError(
            "no call of video self-attention could be sparse, so there is nothing to tune; the log says why."
        )


def _tilings(parts, calls, blocks, selections, progress) -> dict[str, Any]:
    """Block, selection, error and share of each, by one call in the middle of the run; and the default's tiles."""
    some = [call for call in calls if call.run == 0]
    middle = some[len(some) // 2]
    config = VSAConfig(REFERENCE)
    squares: dict[tuple[Any, str], list[float]] = {}
    shares: dict[tuple[Any, str], float] = {}
    tiles = [0]
    progress.begin("blocks and selections", 1)

    def look(name: str, call: OpCall, dense: torch.Tensor) -> None:
        problem = call.problem
        tiles[0] = problem.grid.num_tiles
        seen = set()
        for block in blocks:
            for selection in selections:
                settled, kept = settle(problem.grid.video_shape, block, REFERENCE)
                if (settled, selection) in seen:
                    continue
                seen.add((settled, selection))
                grid = TileGrid(problem.grid.video_shape, settled)
                other = replace(problem, grid=grid, top_k=kept, selection=selection)
                sparse = forward(*call[:5], other, call[6])[0]
                key = (block, selection)
                shares[key] = kept * grid.tile_capacity / grid.num_tokens
                squares.setdefault(key, []).append(
                    relative_error(sparse[:, problem.video], dense[:, problem.video]) ** 2
                )

    _watched(parts, [middle], config, look, progress)
    found = [[*key, statistics.fmean(values) ** 0.5, shares[key]] for key, values in squares.items()]
    return {"tilings": found, "default_tiles": tiles[0]}


def _layers(parts, calls, tiling, progress) -> dict[str, Any]:
    """Names, steps and errors `[layers, steps, ratios]`, root mean squares over prompts and guidance's calls."""
    squares: dict[str, dict[int, list[list[float]]]] = {}
    tiles = [0]
    everything = [call for of_prompt in calls for call in of_prompt]
    progress.begin("layers at several ratios", len(everything))

    def look(name: str, call: OpCall, dense: torch.Tensor) -> None:
        position = position_in_run()
        assert position is not None
        tiles[0] = call.problem.grid.num_tiles
        row = [call.at(ratio).error(dense) ** 2 for ratio in RATIOS]
        squares.setdefault(name, {}).setdefault(position.step, []).append(row)

    for of_prompt in calls:
        _watched(parts, of_prompt, _config(tiling), look, progress)
    steps = sorted({call.step for call in everything})
    names = [name for name, found in squares.items() if len(found) == len(steps)]
    if not names:
        raise ValueError("no layer can be sparse at all measured steps, so there is nothing to tune.")
    errors = [[np.sqrt(np.mean(squares[name][step], axis=0)).tolist() for step in steps] for name in names]
    return {"names": names, "steps": steps, "total": everything[0].total, "tiles": tiles[0], "errors": errors}


def _alone(parts, calls, tiling, layer, progress) -> list[float]:
    """The error of the transformer's output at each step, with one layer sparse and all others dense."""
    some = [call for call in calls()[0] if call.run == 0]
    progress.begin(f"{layer} by itself", len(some))
    with vsa_unchanged(list(parts.values())):
        for part, transformer in parts.items():
            install_vsa(transformer, replace(_config(tiling), modules=(layer,)), part)
        errors = []
        for call, output in replay(parts, some):
            errors.append(relative_error(output, call.output))
            progress.step()
        return errors


def _times(parts, calls, tiling, progress) -> dict[str, Any]:
    """Median seconds of a layer at each ratio, and dense as ratio 0; their spread; and the rest of a forward."""
    some = [call for call in calls if call.run == 0][-1:]
    progress.begin("times of layers", 1)
    times: dict[float, list[float]] = {}
    layers = [0]

    def look(name: str, call: OpCall, dense: torch.Tensor) -> None:
        layers[0] += 1
        runs: dict[float, Callable[[], Any]] = {0.0: lambda: dense_output(*call)}
        for ratio in RATIOS:
            runs[ratio] = partial(forward, *call.at(ratio))
        for ratio, run in runs.items():
            run()  # compiles, or chooses how to launch
            times.setdefault(ratio, []).extend(_seconds(run, dense.device) for _ in range(REPETITIONS))

    _watched(parts, some, _config(tiling), look, progress)
    whole = [_seconds(lambda: list(replay(parts, some)), some[0].output.device) for _ in range(1 + REPETITIONS)][1:]
    medians = {ratio: statistics.median(found) for ratio, found in times.items()}
    spreads = [float(np.subtract(*np.percentile(found, [75, 25]))) / medians[ratio] for ratio, found in times.items()]
    rest = max(0.0, statistics.median(whole) - layers[0] * medians[0.0])
    return {"of": medians, "spread": max(spreads), "rest": rest}


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    run()
    if on_gpu:
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def _config(tiling: Tiling) -> VSAConfig:
    return VSAConfig(REFERENCE, block_size=tiling.block, selection=tiling.selection)


def _block(value: Any) -> Block:
    return value if isinstance(value, str) else (value[0], value[1], value[2])
