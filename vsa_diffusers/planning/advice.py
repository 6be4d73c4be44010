"""Whether sparse attention is worth it on a grid, and what would fit better."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

from ..models.family import Grid
from ..recipes import MANY_TOKENS
from ..tiles import TileGrid, fitting_block_size
from .latents import Extents, latent_extents, token_grid
from .models import Model
from .speed import waste

TILE = 64  # tokens of a whole tile
TOO_SMALL, MARGINAL, EXCELLENT = "too small", "marginal", "excellent"
LEAST_WHOLE_TILES = 16  # below, `video_sparse_attention` warns
WORTH_A_CHANGE = 0.05  # of waste
MOST_CHANGE = 0.12  # of the number of pixels
STEPS = (-2, -1, 0, 1, 2)


def verdict(tokens: int) -> str:
    """The class of a grid of so many tokens: "too small", "marginal" or "excellent"."""
    if tokens < LEAST_WHOLE_TILES * TILE:
        return TOO_SMALL
    return MARGINAL if tokens < MANY_TOKENS else EXCELLENT


def reason(kind: str, tokens: int) -> str:
    """Why the grid is of that class, in a sentence."""
    whole = f"{tokens / TILE:,.0f}".replace(",", " ")
    return {
        TOO_SMALL: f"{whole} tiles' worth of tokens leave next to nothing to skip: below {LEAST_WHOLE_TILES}, stay "
        "with dense attention, or make the video larger or longer.",
        MARGINAL: f"{whole} tiles' worth of tokens: attention gets faster, but it is a small part of the forward. "
        "Whole LTX-2 gained 7% with 96 tiles at ratio 0.2 on one H100.",
        EXCELLENT: f"{whole} tiles' worth of tokens: whole transformers with 274 and more gained 37% to 205% at "
        "ratio 0.2 on one H100.",
    }[kind]


def grid_of(model: Model, size: Extents) -> tuple[Extents, Grid]:
    """Latent extents and token grid of a video `(height, width, frames)`.

    Raises:
        ValueError: a size is not positive, or leaves latents over that make no token.
    """
    for name, extent in zip(("height", "width", "frames"), size, strict=True):
        if extent < 1:
            raise ValueError(f"{name}={extent} must be at least 1.")
    family = model.costs.family
    latents = latent_extents(family, model.config, size, model.vae)
    grid = token_grid(family, model.config, latents)
    for name, extent, step, tokens in zip(("height", "width"), size, pixel_steps(model), grid[1:], strict=False):
        if extent > tokens * step or extent % model.vae[1]:
            below = extent // step * step
            raise ValueError(
                f"{name}={extent} is no multiple of {step}, which {model.name} needs; the nearest are {below} and "
                f"{below + step}."
            )
    return latents, grid


def pixel_steps(model: Model) -> tuple[int, int]:
    """Pixels of one token in height and width."""
    probe = 32
    latents = (1, probe, probe)
    _, rows, columns = token_grid(model.costs.family, model.config, _with_frames(model, latents))
    return model.vae[1] * probe // rows, model.vae[1] * probe // columns


def _with_frames(model: Model, latents: Extents) -> Extents:
    """At least one whole patch in time."""
    patch = model.config.get("patch_size_t") or 1
    return (max(latents[0], patch), *latents[1:])


def block_of(grid: Grid, block_size: tuple[int, int, int] | None) -> TileGrid:
    """The grid cut into this block, or into the one that fits it."""
    return TileGrid(grid, block_size or fitting_block_size(grid))


def better_size(model: Model, size: Extents, block_size: tuple[int, int, int] | None) -> tuple[Extents, float] | None:
    """The nearest size that wastes clearly less, and what it wastes; `None` if there is none.

    Args:
        size: height, width and frames.
        block_size: the block, or `None` for the one that fits each grid.
    """
    now = waste(block_of(grid_of(model, size)[1], block_size))
    if now < 1 + WORTH_A_CHANGE:
        return None
    best: tuple[float, float, Extents] | None = None
    for candidate in _near(model, size):
        try:
            grid = grid_of(model, candidate)[1]
        except ValueError:
            continue
        found = waste(block_of(grid, block_size))
        if found > now - WORTH_A_CHANGE:
            continue
        # A change of the size costs something, too: a tenth of it in waste.
        change = sum(abs(math.log(new / old)) for new, old in zip(candidate, size, strict=True))
        best = min(best or (math.inf, 0.0, size), (found + 0.1 * change, found, candidate))
    return best and (best[2], best[1])


def _near(model: Model, size: Extents) -> Iterator[Extents]:
    height, width, frames = size
    rows, columns = pixel_steps(model)
    ratio = model.vae[0]
    lengths = [frames] if frames == 1 else [frames + step * ratio for step in (-1, 0, 1) if frames + step * ratio > 0]
    for down, across, length in itertools.product(STEPS, STEPS, lengths):
        candidate = (height + down * rows, width + across * columns, length)
        if min(candidate) < 1 or candidate == size:
            continue
        if abs(math.log(candidate[0] * candidate[1] / (height * width))) <= MOST_CHANGE:
            yield candidate
