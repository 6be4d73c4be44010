"""Captioned procedural video: textured shapes that move over moving, patterned backgrounds.

A scene is a handful of numbers relative to the frame and to the clip's length, so the same scene can be rendered at any
resolution, frame count, crop or set of instants. Everything follows from an integer seed.

    scene = sample_scene(seed=7)
    video = render(scene, height=256, width=256, num_frames=61)  # [3, 61, 256, 256] in [-1, 1]
    scene.caption  # "a large red ring moves left over blue waves"
"""

import functools
import itertools
import math
import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import NamedTuple

import torch

SHAPES = ("disc", "ring", "square", "triangle")
SIZES = ("small", "large")
DIRECTIONS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}
PATTERNS = ("waves", "stripes", "checks", "dots")
COLOURS = {
    "red": (0.92, 0.16, 0.14),
    "yellow": (0.96, 0.86, 0.14),
    "green": (0.20, 0.86, 0.26),
    "blue": (0.22, 0.44, 1.00),
    "pink": (1.00, 0.38, 0.82),
    "white": (0.95, 0.95, 0.95),
}
# A dark and a lighter tone each; both are darker than any object, so that an object can be told from its ground.
BACKGROUNDS = {
    "blue": ((0.06, 0.12, 0.34), (0.12, 0.26, 0.52)),
    "green": ((0.04, 0.22, 0.10), (0.12, 0.38, 0.18)),
    "grey": ((0.18, 0.18, 0.19), (0.36, 0.36, 0.38)),
    "purple": ((0.20, 0.07, 0.30), (0.36, 0.16, 0.50)),
}
RADII = {"small": 0.15, "large": 0.23}
SPLITS = ("train", "held_out")


@dataclass(frozen=True)
class Description:
    """What a caption says."""

    size: str
    colour: str
    shape: str
    direction: str
    background: str
    pattern: str

    @property
    def caption(self) -> str:
        return f"a {self.size} {self.colour} {self.shape} moves {self.direction} over {self.background} {self.pattern}"

    @property
    def split(self) -> str:
        """One combination in ten is never trained on; a checksum decides, so the split outlives any seed."""
        return "held_out" if zlib.crc32(self.caption.encode()) % 10 == 0 else "train"


@dataclass(frozen=True)
class Body:
    """One moving shape. Lengths are shares of the frame's shorter side, times are shares of the clip."""

    shape: str
    colour: tuple[float, float, float]
    radius: float
    start: tuple[float, float]
    travel: tuple[float, float]
    angle: float
    spin: float
    texture_frequency: float
    in_front: bool = False


@dataclass(frozen=True)
class Scene:
    """A description with all that the caption leaves open."""

    description: Description
    main: Body
    others: tuple[Body, ...]
    pattern_frequency: float
    pattern_angle: float
    pattern_phase: float
    background_travel: tuple[float, float]

    @property
    def caption(self) -> str:
        return self.description.caption


@functools.cache
def descriptions(split: str) -> tuple[Description, ...]:
    """All descriptions of a split, always in the same order."""
    everything = itertools.product(SIZES, COLOURS, SHAPES, DIRECTIONS, BACKGROUNDS, PATTERNS)
    return tuple(d for d in itertools.starmap(Description, everything) if d.split == split)


def vocabulary() -> list[str]:
    """Every word that a caption can hold, sorted."""
    return sorted({word for split in SPLITS for d in descriptions(split) for word in d.caption.split()})


def sample_scene(seed: int, split: str = "train", description: Description | None = None) -> Scene:
    """The scene that belongs to `seed`, of a random description of `split` unless one is given."""
    rng = random.Random(f"{split}-{seed}")
    description = description or rng.choice(descriptions(split))
    pan = (rng.uniform(-0.12, 0.12), rng.uniform(-0.12, 0.12))
    heading = DIRECTIONS[description.direction]
    distance, drift = rng.uniform(0.40, 0.52), rng.uniform(-0.05, 0.05)
    travel = tuple(distance * along + drift * (1.0 - abs(along)) for along in heading)
    middle = (0.5 + rng.uniform(-0.03, 0.03), 0.5 + rng.uniform(-0.03, 0.03))
    # Across its heading the object may lie anywhere that keeps it in view.
    offset = rng.uniform(-1.0, 1.0) * (0.46 - RADII[description.size])
    middle = tuple(m + offset * (1.0 - abs(along)) for m, along in zip(middle, heading, strict=True))
    main = Body(
        shape=description.shape,
        colour=COLOURS[description.colour],
        radius=RADII[description.size] * rng.uniform(0.92, 1.08),
        start=tuple(m - t / 2 for m, t in zip(middle, travel, strict=True)),
        travel=travel,
        angle=rng.uniform(0.0, 2 * math.pi),
        spin=rng.uniform(-1.5, 1.5),
        texture_frequency=rng.uniform(14.0, 20.0),
    )
    others = tuple(_sample_other(rng, description, pan) for _ in range(rng.choice((0, 1, 1))))
    ground = rng.uniform(0.10, 0.25)
    ground_angle = rng.uniform(0.0, 2 * math.pi)
    return Scene(
        description=description,
        main=main,
        others=others,
        pattern_frequency=rng.uniform(3.5, 5.5),
        pattern_angle=rng.uniform(-0.5, 0.5),
        pattern_phase=rng.uniform(0.0, 1.0),
        background_travel=(pan[0] + ground * math.cos(ground_angle), pan[1] + ground * math.sin(ground_angle)),
    )


def _sample_other(rng: random.Random, description: Description, pan: tuple[float, float]) -> Body:
    """A smaller bystander of another shape and colour, which drifts, and may pass in front of the main object."""
    travel = (pan[0] + rng.uniform(-0.4, 0.4), pan[1] + rng.uniform(-0.4, 0.4))
    middle = (rng.uniform(0.15, 0.85), rng.uniform(0.15, 0.85))
    return Body(
        shape=rng.choice([shape for shape in SHAPES if shape != description.shape]),
        colour=COLOURS[rng.choice([colour for colour in COLOURS if colour != description.colour])],
        radius=rng.uniform(0.06, 0.08),
        start=tuple(m - t / 2 for m, t in zip(middle, travel, strict=True)),
        travel=travel,
        angle=rng.uniform(0.0, 2 * math.pi),
        spin=rng.uniform(-2.0, 2.0),
        texture_frequency=rng.uniform(25.0, 35.0),
        in_front=rng.random() < 0.5,
    )


class View(NamedTuple):
    """Which instants, rows and columns of a clip to compute: 1-D coordinates in the scene's units, and the pixel's."""

    time: torch.Tensor
    y: torch.Tensor
    x: torch.Tensor
    pixel: float


def view(height: int, width: int, num_frames: int, window: tuple[slice, slice, slice] = (slice(None),) * 3) -> View:
    """The part of a clip of this size that `window` (frames, rows, columns) picks.

    A scene is a unit square; on an oblong frame it sits in the middle and its background goes on to the edges.
    """
    frames, rows, columns = window
    scale = min(height, width)
    return View(
        time=torch.arange(num_frames)[frames] / max(num_frames - 1, 1),
        y=(torch.arange(height)[rows] + 0.5 - (height - scale) / 2) / scale,
        x=(torch.arange(width)[columns] + 0.5 - (width - scale) / 2) / scale,
        pixel=1.0 / scale,
    )


def render(
    scene: Scene,
    height: int,
    width: int,
    num_frames: int,
    *,
    device: torch.device | str = "cpu",
    window: tuple[slice, slice, slice] = (slice(None),) * 3,
) -> torch.Tensor:
    """Render `[3, frames, height, width]` in [-1, 1], anti-aliased; with a `window`, only that part of it."""
    return render_batch([scene], [view(height, width, num_frames, window)], device=device)[0]


def render_batch(scenes: Sequence[Scene], views: Sequence[View], *, device: torch.device | str = "cpu") -> torch.Tensor:
    """Render `[scenes, 3, frames, height, width]` at once, each scene with its own view, all views of equal shape."""
    time = torch.stack([one.time for one in views]).to(device)[:, :, None, None]
    y = torch.stack([one.y for one in views]).to(device)[:, None, :, None]
    x = torch.stack([one.x for one in views]).to(device)[:, None, None, :]
    pixel = _column([one.pixel for one in views], device)

    tones = torch.tensor([BACKGROUNDS[scene.description.background] for scene in scenes], device=device)
    dark, light = tones[:, :, :, None, None, None].unbind(1)
    video = torch.lerp(dark, light, _pattern(scenes, time, y, x)[:, None])
    for layer in _layers(scenes):
        coverage, shade = _draw(layer, time, y, x, pixel)
        colour = torch.tensor([body.colour for body in layer], device=device)[:, :, None, None, None]
        video = torch.lerp(video, colour * shade[:, None], coverage[:, None])
    return video.mul_(2.0).sub_(1.0)


def _column(values: list[float], device: torch.device | str) -> torch.Tensor:
    """One number per scene, `[scenes, 1, 1, 1]`."""
    return torch.tensor(values, device=device).view(-1, 1, 1, 1)


def _columns(vectors: list[tuple[float, ...]], device: torch.device | str) -> tuple[torch.Tensor, ...]:
    """One column for each component."""
    return tuple(_column(list(values), device) for values in zip(*vectors, strict=True))


def _layers(scenes: Sequence[Scene]) -> list[list[Body]]:
    """One body per scene for every layer, from back to front. A scene with nothing there gets an empty body."""
    behind = zip_longest(*([body for body in scene.others if not body.in_front] for scene in scenes))
    before = zip_longest(*([body for body in scene.others if body.in_front] for scene in scenes))
    layers = [*behind, [scene.main for scene in scenes], *before]
    nothing = replace(scenes[0].main, radius=-1.0)
    return [[body or nothing for body in layer] for layer in layers]


def _choose(names: list[str], compute: Callable[[str], torch.Tensor]) -> torch.Tensor:
    """For each scene the result that belongs to its name; what no scene wants is not computed."""
    first, *rest = sorted(set(names))
    result = compute(first)
    for name in rest:
        wanted = torch.tensor([one == name for one in names], device=result.device).view(-1, 1, 1, 1)
        result = torch.where(wanted, compute(name), result)
    return result


def _pattern(scenes: Sequence[Scene], time: torch.Tensor, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Share of the lighter tone, `[scenes, frames, height, width]`; edges are softer than a pixel at useful sizes."""
    travel_x, travel_y = _columns([scene.background_travel for scene in scenes], x.device)
    angle = _column([scene.pattern_angle for scene in scenes], x.device)
    turn = _column([2 * math.pi * scene.pattern_frequency for scene in scenes], x.device)
    phase = _column([2 * math.pi * scene.pattern_phase for scene in scenes], x.device)
    x, y = x - travel_x * time, y - travel_y * time
    u = turn * (angle.cos() * x - angle.sin() * y) + phase
    v = turn * (angle.sin() * x + angle.cos() * y) + phase

    def level(pattern: str) -> torch.Tensor:
        match pattern:
            case "waves":
                return torch.sin(v + 1.2 * torch.sin(0.6 * u))
            case "stripes":
                return torch.sin(u)
            case "checks":
                return 1.6 * torch.sin(0.7 * u) * torch.sin(0.7 * v)
            case "dots":
                return torch.cos(u) + torch.cos(v) - 0.9
        raise ValueError(f"Unknown pattern {pattern!r}; known are {PATTERNS}.")

    return (0.5 + 1.1 * _choose([scene.description.pattern for scene in scenes], level)).clamp_(0.0, 1.0)


def _draw(
    bodies: list[Body], time: torch.Tensor, y: torch.Tensor, x: torch.Tensor, pixel: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Coverage and brightness of one body per scene, `[scenes, frames, height, width]` each."""
    start_x, start_y = _columns([body.start for body in bodies], x.device)
    travel_x, travel_y = _columns([body.travel for body in bodies], x.device)
    angle, spin, radius, frequency = _columns(
        [(body.angle, body.spin, body.radius, body.texture_frequency) for body in bodies], x.device
    )
    x, y = x - (start_x + travel_x * time), y - (start_y + travel_y * time)
    angle = angle + spin * time
    u = angle.cos() * x + angle.sin() * y
    v = angle.cos() * y - angle.sin() * x
    distance = _choose([body.shape for body in bodies], lambda shape: _signed_distance(shape, u, v, radius))
    coverage = (0.5 - distance / pixel).clamp_(0.0, 1.0)
    shade = 0.90 + 0.10 * torch.sin(2.0 * frequency * u)
    return coverage, shade


def _signed_distance(shape: str, u: torch.Tensor, v: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """Distance to the outline, negative inside (near enough outside corners for anti-aliasing)."""
    match shape:
        case "disc":
            return torch.sqrt(u * u + v * v) - 0.92 * radius
        case "ring":
            return (torch.sqrt(u * u + v * v) - 0.74 * radius).abs_() - 0.26 * radius
        case "square":
            return torch.maximum(u.abs(), v.abs()) - 0.82 * radius
        case "triangle":
            return torch.maximum(math.sqrt(3.0) / 2 * u.abs() - 0.5 * v, v) - 0.62 * radius
    raise ValueError(f"Unknown shape {shape!r}; known are {SHAPES}.")
