"""`plan`: grid, tiles, costs, expected speed-ups and advice for a model and a size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..models.family import Grid
from ..processor import TRAINED_BLOCK_SIZE
from ..recipes import NAMES, Recipe, recipe_of, size_class
from ..tiles import TileGrid, check_block_size, check_top_k, fitting_block_size, num_selected_tiles
from .advice import EXCELLENT, TOO_SMALL, better_size, block_of, grid_of, reason, verdict
from .latents import Extents
from .measuring import Progress, Timed, time_layer
from .models import Model, resolve
from .speed import GPUS, Layer, expected_layer, measured, measured_model, other_seconds, waste

RATIOS = (0.5, 0.3, 0.2, 0.1)


@dataclass(frozen=True)
class Speed:
    """What is expected at one ratio: tiles kept, milliseconds of a layer, times as fast as dense."""

    ratio: float
    kept_tiles: int
    layer_ms: float
    layer: float
    model: float


@dataclass(frozen=True)
class Suggestion:
    """A recipe for this model and size, and how many times as fast as dense a whole video's denoising becomes."""

    name: str
    top_k_ratio: float
    dense_steps: int | float
    dense_layers: tuple[int, ...]
    source: str
    speedup: float


@dataclass(frozen=True)
class Plan:
    """What Video Sparse Attention is expected to do for a model at a size. Prints as a table with rich.

    Args:
        model: the checkpoint or folder.
        family: that serves it.
        transformer: class name in diffusers.
        size: height, width and frames.
        latents: latent frames, height and width.
        video_shape: `(T, H, W)`, the grid of tokens.
        tokens: of the video.
        block: tokens per tile along each axis.
        tiles_per_axis: along each axis.
        tiles: in all.
        padding: share of the tiles' slots that hold no token.
        waste: what the tiles cost as a multiple of what the tokens alone would.
        layers: video self-attention modules.
        heads: of each.
        head_dim: of each head.
        parameters: of the transformer.
        batch: of one call, with guidance.
        calls: of the transformer for one video.
        combine: of the two branches, "merge" or "gate".
        attention_of_flops: share of video self-attention in a dense forward, by FLOPs: an estimate.
        attention_of_time: share in its time on `device`: an estimate.
        device: that speeds are for.
        dense_ms: of one layer.
        speeds: by ratio.
        origin: where speeds are from.
        reach: how far that is from this shape.
        kind: "too small", "marginal" or "excellent".
        advice: sentences, the reason of `kind` first.
        recipes: for this family and size; none where gates were trained for one ratio.
        notes: what else to know of these figures.
        source: where the model's facts are from.
    """

    model: str
    family: str
    transformer: str
    size: Extents
    latents: Extents
    video_shape: Grid
    tokens: int
    block: tuple[int, int, int]
    tiles_per_axis: tuple[int, int, int]
    tiles: int
    padding: float
    waste: float
    layers: int
    heads: int
    head_dim: int
    parameters: int
    batch: int
    calls: int
    combine: str
    attention_of_flops: float
    attention_of_time: float
    device: str
    dense_ms: float
    speeds: tuple[Speed, ...]
    origin: str
    reach: str
    kind: str
    advice: tuple[str, ...]
    recipes: tuple[Suggestion, ...]
    notes: tuple[str, ...]
    source: str

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings, ready for JSON."""
        return asdict(self)

    def __rich__(self) -> Any:
        """What rich prints for it."""
        from .rendering import rendered

        return rendered(self)


def plan(
    model: str,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    *,
    ratios: Sequence[float] = RATIOS,
    gpu: str = "H100",
    block_size: Sequence[int] | str | None = None,
    measure: bool = False,
    progress: Progress = lambda what: None,
) -> Plan:
    """What to expect of a model at a size, without its weights and, for published checkpoints, without a network.

    Args:
        model: a family ("wan", "ltx2"), a published or other id on the Hugging Face Hub, or the folder of a pipeline or
            transformer.
        height: of the video, in pixels; like width and frames the model's usual if it is left out.
        width: in pixels.
        frames: of the video, not of its latents.
        ratios: `top_k_ratio`s to look at.
        gpu: whose measurements to estimate from, "H100" or "H200".
        block_size: `(t, h, w)`, or `"auto"`; `None` fits the grid, or is (4, 4, 4) where gates were trained for that.
        measure: time a layer of this shape on this machine instead of estimating it.
        progress: called with what is about to be timed.

    Raises:
        ValueError: an argument is wrong, or the model is not known, or not supported.
    """
    known = resolve(model)
    usual_height, usual_width, usual_frames = known.size
    size = (
        usual_height if height is None else height,
        usual_width if width is None else width,
        usual_frames if frames is None else frames,
    )
    ratios = [_checked_ratio(ratio) for ratio in ratios]
    if not ratios:
        raise ValueError("ratios=() must hold at least one top_k_ratio, such as 0.2.")
    if gpu not in GPUS:
        raise ValueError(f"gpu={gpu!r} has no shipped measurements; choose {' or '.join(GPUS)}, or measure here.")
    latents, shape = grid_of(known, size)
    combine = "gate" if known.gates else "merge"
    fixed = _block(block_size, combine)
    grid = block_of(shape, fixed)
    fitted = grid.block_size == fitting_block_size(shape)
    costs, text = known.costs, known.text_tokens
    flops = costs.attention_share(shape, known.batch, text)
    layers = sum(factor**2 for factor in costs.tiled)  # that many of the plain grid
    recipes = _recipes(known, grid.num_tokens)
    wanted = list(dict.fromkeys([*ratios, *(recipe.top_k_ratio for _, recipe, _ in recipes)]))
    estimate = expected_layer(gpu, costs, known.batch, grid, fitted, combine, wanted)
    other = other_seconds(gpu, costs, shape, known.batch, text)
    device, dense_ms, sparse_ms, origin, reach = f"NVIDIA {gpu}", *_times(estimate)
    notes = _notes(known, estimate, gpu, shape)
    if measure:
        timed = time_layer(costs, known.batch, grid, combine, wanted, progress)
        device, dense_ms, sparse_ms = timed.device, timed.dense_ms, timed.sparse_ms
        origin, reach = _how_timed(timed, costs.heads), "measured"
        notes = _unsure(known)
        if (here := next((name for name in GPUS if name in device), None)) is not None:
            other = other_seconds(here, costs, shape, known.batch, text)
        else:
            other = layers * dense_ms / 1e3 * (1 - flops) / flops
            notes.append("The rest of the model is taken to run at attention's own FLOPs a second: an estimate.")

    def whole(ratio_ms: float, share: float = 1.0) -> float:
        """Times as fast as dense where `share` of all attention calls is sparse."""
        dense = layers * dense_ms / 1e3
        return (other + dense) / (other + dense * (1 - share) + share * layers * ratio_ms / 1e3)

    speeds = tuple(
        Speed(ratio, num_selected_tiles(grid.num_tiles, ratio), sparse_ms[ratio], dense_ms / sparse_ms[ratio],
              whole(sparse_ms[ratio]))
        for ratio in ratios
    )  # fmt: skip
    suggested = tuple(_suggestion(name, recipe, whole(sparse_ms[recipe.top_k_ratio], share))
                      for name, recipe, share in recipes)  # fmt: skip
    return Plan(
        model=known.name, family=costs.family.name, transformer=known.transformer, size=size, latents=latents,
        video_shape=shape, tokens=grid.num_tokens, block=grid.block_size, tiles_per_axis=grid.tiles_per_axis,
        tiles=grid.num_tiles, padding=grid.padding, waste=waste(grid), layers=len(costs.layers), heads=costs.heads,
        head_dim=costs.head_dim, parameters=costs.parameters, batch=known.batch, calls=known.steps * known.calls,
        combine=combine, attention_of_flops=flops,
        attention_of_time=layers * dense_ms / 1e3 / (other + layers * dense_ms / 1e3), device=device, dense_ms=dense_ms,
        speeds=speeds, origin=origin, reach=reach, kind=verdict(grid.num_tokens),
        advice=tuple(_advice(known, size, grid, fixed)), recipes=suggested, notes=tuple(notes),
        source=known.source,
    )  # fmt: skip


def _checked_ratio(ratio: float) -> float:
    check_top_k(None, ratio)
    return float(ratio)


def _block(block_size: Sequence[int] | str | None, combine: str) -> tuple[int, int, int] | None:
    """The block that was asked for, or `None` for the one that fits the grid."""
    if block_size is None:
        return TRAINED_BLOCK_SIZE if combine == "gate" else None
    if isinstance(block_size, str):
        if block_size != "auto":
            raise ValueError(f'block_size={block_size!r} must be three numbers, such as (4, 4, 4), or "auto".')
        if combine == "gate":
            raise ValueError('block_size="auto" does not fit trained gates; leave it out, which is (4, 4, 4).')
        return None
    return check_block_size(block_size)


def _times(layer: Layer) -> tuple[float, dict[float, float], str, str]:
    return layer.dense_ms, layer.sparse_ms, layer.origin, layer.reach


def _how_timed(timed: Timed, heads: int) -> str:
    if timed.heads == heads:
        return "timed here on random inputs"
    return f"timed here on random inputs with {timed.heads} of {heads} heads in fp32, and scaled to all"


def _unsure(model: Model) -> list[str]:
    return [f"Not certain: {model.unsure}."] if model.unsure else []


def _notes(model: Model, layer: Layer, gpu: str, shape: Grid) -> list[str]:
    notes = _unsure(model)
    errors = measured()["rest"][gpu]["left_out"]
    masked = max(errors, key=lambda name: abs(errors[name]))
    others = max(abs(error) for name, error in errors.items() if name != masked)
    notes.append(
        f"Whole models: estimated without torch.compile. Of six that were measured, each left out in its turn, five "
        f"come out within {others:.1%}, and {masked}, whose padded text slows dense attention, {-errors[masked]:.0%} "
        "too low."
    )
    if any(abs(ms - layer.host_ms) < 1e-9 for ms in layer.sparse_ms.values()):
        notes.append(f"A sparse call takes the host {layer.host_ms:.2f} ms; layers as short as here wait for it.")
    row = measured_model(gpu, model.name, shape)
    if row is not None:
        notes.insert(0, (
            f"Measured on one {row['gpu']}: the whole transformer is {row['dense_s'] / row['sparse_s']:.2f} times as "
            f"fast at 0.2 (batch {row['batch']}, {row['what']})."
        ))  # fmt: skip
    return notes


def _advice(model: Model, size: Extents, grid: TileGrid, fixed: tuple[int, int, int] | None) -> list[str]:
    kind = verdict(grid.num_tokens)
    sentences = [reason(kind, grid.num_tokens)]
    if kind == TOO_SMALL:
        return sentences
    if fixed is not None and not model.gates:
        fitting = block_of(grid.video_shape, None)
        if waste(fitting) < waste(grid) - 0.02:
            sentences.append(
                f'block_size="auto" takes {_by(fitting.block_size)} here, which costs {_over(waste(fitting))} more '
                f"than whole tiles would, instead of {_over(waste(grid))}."
            )
    better = better_size(model, size, fixed)
    if better is not None:
        (height, width, frames), found = better
        sentences.append(
            f"A size that fits nearby: {height}x{width} and {frames} frames, where tiles cost {_over(found)} more than "
            f"whole ones, instead of {_over(waste(grid))}."
        )
    if model.gates:
        sentences.append("Its gates were trained for one ratio and blocks of 4x4x4: use those of its card.")
    elif kind == EXCELLENT:
        sentences.append("What is not attention gains from torch.compile; enable VSA first, then compile.")
    return sentences


def _by(block: tuple[int, int, int]) -> str:
    return "x".join(map(str, block))


def _over(cost: float) -> str:
    return f"{cost - 1:.0%}"


def _recipes(known: Model, tokens: int) -> list[tuple[str, Recipe, float]]:
    """The recipes for this size by name, each with the share of attention calls that it makes sparse."""
    if known.gates or verdict(tokens) == TOO_SMALL:
        return []
    found = []
    for name in NAMES:
        recipe = recipe_of(known.costs.family.name, size_class(tokens), name)
        steps = recipe.dense_steps
        dense = steps if isinstance(steps, int) else math.ceil(steps * known.steps - 1e-9)
        layers = len(known.costs.layers)
        found.append((name, recipe, (1 - dense / known.steps) * (1 - len(recipe.dense_layers) / layers)))
    return found


def _suggestion(name: str, recipe: Recipe, speedup: float) -> Suggestion:
    return Suggestion(name, recipe.top_k_ratio, recipe.dense_steps, recipe.dense_layers, recipe.source, speedup)
