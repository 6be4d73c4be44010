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
from dataclasses import dataclass

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


def render(
    scene: Scene,
    height: int,
    width: int,
    num_frames: int,
    *,
    device: torch.device | str = "cpu",
    window: tuple[slice, slice, slice] = (slice(None), slice(None), slice(None)),
) -> torch.Tensor:
    """Render `[3, frames, height, width]` in [-1, 1], anti-aliased.

    `window` picks (frames, rows, columns) of the full clip; only those are computed.
    """
    scale = min(height, width)
    frames, rows, columns = window
    time = torch.arange(num_frames, device=device, dtype=torch.float32)[frames] / max(num_frames - 1, 1)
    y = (torch.arange(height, device=device, dtype=torch.float32)[rows] + 0.5) / scale
    x = (torch.arange(width, device=device, dtype=torch.float32)[columns] + 0.5) / scale
    # The scene is a unit square; on an oblong frame it sits in the middle and its background goes on to the edges.
    y = y - (height / scale - 1.0) / 2
    x = x - (width / scale - 1.0) / 2
    grid = time[:, None, None], y[None, :, None], x[None, None, :]

    share = _pattern(scene, *grid)
    dark, light = (torch.tensor(tone, device=device) for tone in BACKGROUNDS[scene.description.background])
    video = torch.lerp(dark.view(3, 1, 1, 1), light.view(3, 1, 1, 1), share)
    behind = [body for body in scene.others if not body.in_front]
    before = [body for body in scene.others if body.in_front]
    for body in (*behind, scene.main, *before):
        coverage, shade = _draw(body, *grid, pixel=1.0 / scale)
        colour = torch.tensor(body.colour, device=device).view(3, 1, 1, 1)
        video = torch.lerp(video, colour * shade, coverage)
    return video.mul_(2.0).sub_(1.0)


def _pattern(scene: Scene, time: torch.Tensor, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Share of the lighter tone, `[frames, height, width]`. Soft edges stay wider than a pixel at any useful size."""
    x = x - scene.background_travel[0] * time
    y = y - scene.background_travel[1] * time
    cos, sin = math.cos(scene.pattern_angle), math.sin(scene.pattern_angle)
    turn = 2 * math.pi * scene.pattern_frequency
    phase = 2 * math.pi * scene.pattern_phase
    u = turn * (cos * x - sin * y) + phase
    v = turn * (sin * x + cos * y) + phase
    match scene.description.pattern:
        case "waves":
            level = torch.sin(v + 1.2 * torch.sin(0.6 * u))
        case "stripes":
            level = torch.sin(u)
        case "checks":
            level = 1.6 * torch.sin(0.7 * u) * torch.sin(0.7 * v)
        case "dots":
            level = torch.cos(u) + torch.cos(v) - 0.9
    return (0.5 + 1.1 * level).clamp_(0.0, 1.0)


def _draw(
    body: Body, time: torch.Tensor, y: torch.Tensor, x: torch.Tensor, pixel: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Coverage and brightness of a body, `[frames, height, width]` each."""
    dx = x - (body.start[0] + body.travel[0] * time)
    dy = y - (body.start[1] + body.travel[1] * time)
    angle = body.angle + body.spin * time
    cos, sin = torch.cos(angle), torch.sin(angle)
    u = cos * dx + sin * dy
    v = cos * dy - sin * dx
    distance = _signed_distance(body.shape, u, v, body.radius)
    coverage = (0.5 - distance / pixel).clamp_(0.0, 1.0)
    shade = 0.90 + 0.10 * torch.sin(body.texture_frequency * 2.0 * u)
    return coverage, shade


def _signed_distance(shape: str, u: torch.Tensor, v: torch.Tensor, radius: float) -> torch.Tensor:
    """Distance to the outline, negative inside (near enough outside corners for anti-aliasing)."""
    match shape:
        case "disc":
            return torch.sqrt(u * u + v * v) - 0.92 * radius
        case "ring":
            return (torch.sqrt(u * u + v * v) - 0.74 * radius).abs_() - 0.26 * radius
        case "square":
            return torch.maximum(u.abs(), v.abs()) - 0.82 * radius
        case "triangle":
            slope = math.sqrt(3.0) / 2 * u.abs() - 0.5 * v
            return torch.maximum(slope, v) - 0.62 * radius
    raise ValueError(f"Unknown shape {shape!r}; known are {SHAPES}.")
