"""A judge of videos: which colour, which shape, which way. It sees frames only, never the caption.

Objects are brighter than backgrounds, so pixels are sorted by brightness and hue; the colour that covers most is the
main object's, its centroid's path gives the direction, and moments, whatever its size or turn, give the shape.
`PYTHONPATH=examples/training python examples/research/caption_detector.py` measures how often it is right on rendered
clips of held-out captions.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
import typer
from procedural_video import COLOURS, DIRECTIONS, render, sample_scene

from vsa_diffusers.cli.script import run_script

FRAMES_LOOKED_AT = 16
BRIGHT = 0.62
MINIMUM_AREA = 0.008
MINIMUM_TRAVEL = 0.12
# Half-way between the medians of the shapes on rendered training clips.
RING_IF_EMPTY_BELOW = 0.5
TRIANGLE_IF_THREEFOLD_ABOVE = 0.034
SQUARE_IF_FOURFOLD_ABOVE = 0.0085


@dataclass(frozen=True)
class Verdict:
    """What was seen; None where nothing was."""

    shape: str | None = None
    colour: str | None = None
    direction: str | None = None

    def agrees(self, description) -> dict[str, bool]:
        """Which parts of a caption's description are right."""
        return {part: getattr(self, part) == getattr(description, part) for part in ("shape", "colour", "direction")}


def detect(video: torch.Tensor) -> Verdict:
    """Judge a video `[3, frames, height, width]` with values in [-1, 1]."""
    picks = torch.linspace(0, video.shape[1] - 1, min(FRAMES_LOOKED_AT, video.shape[1])).round().long()
    frames = (video[:, picks].float() + 1) / 2
    masks = _colour_masks(frames)
    areas = masks.float().mean((1, 2, 3))
    best = int(areas.argmax())
    mask = masks[best].float()
    share = mask.mean((1, 2))
    seen = share > MINIMUM_AREA
    if seen.sum() < 3:
        return Verdict()
    centres, features = zip(*(_moments(frame) for frame in mask[seen]), strict=True)
    weights = share[seen] >= share[seen].median() * 0.8
    return Verdict(
        shape=_shape(torch.stack(features)[weights].median(0).values),
        colour=list(COLOURS)[best],
        direction=_direction(torch.stack(centres), picks[seen.cpu()].to(mask.device) / (video.shape[1] - 1)),
    )


def _colour_masks(frames: torch.Tensor) -> torch.Tensor:
    """Which pixels show which colour, `[colours, frames, height, width]`."""
    palette = torch.tensor(list(COLOURS.values()), device=frames.device)
    palette = palette / palette.amax(1, keepdim=True)
    brightness = frames.amax(0)
    hue = frames / brightness.clamp_min(1e-3)
    distances = (hue[None] - palette.view(-1, 3, 1, 1, 1)).square().sum(1)
    nearest = torch.where(brightness > BRIGHT, distances.argmin(0), -1)
    return nearest[None] == torch.arange(len(palette), device=frames.device).view(-1, 1, 1, 1)


def _moments(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Centroid (x, y) in shares of the frame, and (filled centre, threefold, fourfold symmetry) of one frame's mask."""
    height, width = mask.shape
    y, x = torch.meshgrid(
        (torch.arange(height, device=mask.device) + 0.5) / height,
        (torch.arange(width, device=mask.device) + 0.5) / width,
        indexing="ij",
    )
    total = mask.sum()
    centre_x, centre_y = (x * mask).sum() / total, (y * mask).sum() / total
    area = mask.mean()
    # In these units the object covers an area of one.
    z = torch.complex(x - centre_x, y - centre_y) / area.sqrt()
    near = z.abs() < 0.15
    filled = mask[near].mean() if near.any() else mask.new_zeros(())
    threefold = ((z**3) * mask).sum().abs() / total
    fourfold = ((z**4) * mask).sum().abs() / total
    return torch.stack([centre_x, centre_y]), torch.stack([filled, threefold, fourfold])


def _shape(features: torch.Tensor) -> str:
    filled, threefold, fourfold = features.tolist()
    if filled < RING_IF_EMPTY_BELOW:
        return "ring"
    if threefold > TRIANGLE_IF_THREEFOLD_ABOVE:
        return "triangle"
    return "square" if fourfold > SQUARE_IF_FOURFOLD_ABOVE else "disc"


def _direction(centres: torch.Tensor, times: torch.Tensor) -> str | None:
    """Way of the straight line through the centroids, if it is long enough."""
    offset = times - times.mean()
    travel = (offset[:, None] * (centres - centres.mean(0))).sum(0) / offset.square().sum()
    axis = int(travel.abs().argmax())
    if travel[axis].abs() < MINIMUM_TRAVEL:
        return None
    return next(name for name, way in DIRECTIONS.items() if way[axis] * travel[axis] > 0)


def validate(clips: int, side: int = 256, frames: int = 61, device: torch.device | str = "cpu") -> dict[str, float]:
    """Share of rendered held-out clips judged rightly, per part and altogether."""
    right = []
    for seed in range(clips):
        scene = sample_scene(seed, split="held_out")
        picked = slice(0, frames, max(1, (frames - 1) // (FRAMES_LOOKED_AT - 1)))
        video = render(scene, side, side, frames, device=device, window=(picked, slice(None), slice(None)))
        right.append(detect(video).agrees(scene.description))
    shares = {part: sum(one[part] for one in right) / clips for part in right[0]}
    return {**shares, "all": sum(all(one.values()) for one in right) / clips}


def main(clips: Annotated[int, typer.Option(help="Rendered clips of each size to judge.", min=1)] = 200) -> None:
    """Print how often the detector is right, at two sizes of held-out clips."""
    for side, frames in ((256, 61), (128, 29)):
        shares = validate(clips, side, frames)
        print(f"{side}x{side}, {frames} frames:", ", ".join(f"{part} {share:.1%}" for part, share in shares.items()))


if __name__ == "__main__":
    run_script(main)
