"""How close one video is to another."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..extras import check_installed

_CHUNK = 8  # frames at once: SSIM keeps several copies of them
_SMALLEST = 64  # pixels, of what the learned distance's network can take

Distance = Callable[[np.ndarray, np.ndarray], float]


@dataclass(frozen=True)
class Closeness:
    """Of a video to a reference.

    Args:
        psnr: dB, over all pixels of the video; infinity where they are the same.
        ssim: structural similarity, the mean over frames; 1 is the same.
        distance: LPIPS, the mean over frames; 0 is the same. `None` where its weights are not installed.
    """

    psnr: float
    ssim: float
    distance: float | None = None


def closeness(
    frames: np.ndarray,
    reference: np.ndarray,
    distance: Distance | None = None,
    device: str | torch.device = "cpu",
) -> Closeness:
    """Compare a video with a reference, both `[frames, height, width, 3]`, uint8, as files hold them.

    Args:
        frames: the video.
        reference: what it is compared with.
        distance: computes the learned distance, as `learned_distance` gives it.
        device: where SSIM is computed; PSNR always on the CPU, in fp64, in which its sum is exact.

    Raises:
        ValueError: they are of different sizes.
        ImportError: torchmetrics is not installed.
    """
    if frames.shape != reference.shape:
        raise ValueError(f"frames {list(frames.shape)} differ in size from the reference's {list(reference.shape)}.")
    if np.array_equal(frames, reference):
        return Closeness(float("inf"), 1.0, None if distance is None else 0.0)
    check_installed("torchmetrics")
    from torchmetrics.image import StructuralSimilarityIndexMeasure
    from torchmetrics.regression import MeanSquaredError

    # In fp64, in which sums of whole numbers are exact in any order; torchmetrics' PSNR takes whole numbers to fp32.
    squared = MeanSquaredError().set_dtype(torch.float64)
    ssim = StructuralSimilarityIndexMeasure(data_range=1.0).to(device)
    for chunks in _chunks(frames, reference):
        squared.update(*(chunk.flatten().double() for chunk in chunks))
        ssim.update(*(chunk.to(device) / 255 for chunk in chunks))
    learned = None if distance is None else distance(frames, reference)
    psnr = 10 * math.log10(255**2 / squared.compute().item())
    return Closeness(psnr, torch.as_tensor(ssim.compute()).item(), learned)


def learned_distance(device: str | torch.device = "cpu") -> tuple[Distance | None, str | None]:
    """LPIPS (Zhang et al. 2018, AlexNet) where its weights are on this machine, else `None` and why; no download."""
    if importlib.util.find_spec("torchvision") is None:
        return None, "torchvision, whose AlexNet it is made of, is not installed"
    from torchvision.models import AlexNet_Weights

    weights = Path(torch.hub.get_dir(), "checkpoints", Path(AlexNet_Weights.DEFAULT.url).name)
    if not weights.exists():
        return None, f"the weights of torchvision's AlexNet, {weights.name}, are not in torch's cache"
    from torchmetrics.image import LearnedPerceptualImagePatchSimilarity

    network = LearnedPerceptualImagePatchSimilarity("alex", normalize=True).to(device)

    @torch.no_grad()
    def distance(frames: np.ndarray, reference: np.ndarray) -> float:
        network.reset()
        for ours, theirs in _chunks(frames, reference):
            network.update(*(_large_enough(chunk.to(device) / 255) for chunk in (ours, theirs)))
        return float(network.compute())

    return distance, None


def _chunks(*videos: np.ndarray) -> Iterator[list[torch.Tensor]]:
    """Some frames of each video at a time, `[frames, 3, height, width]`, uint8."""
    for first in range(0, len(videos[0]), _CHUNK):
        yield [torch.from_numpy(video[first : first + _CHUNK]).permute(0, 3, 1, 2) for video in videos]


def _large_enough(frames: torch.Tensor) -> torch.Tensor:
    smallest = min(frames.shape[2:])
    if smallest >= _SMALLEST:
        return frames
    return torch.nn.functional.interpolate(frames, scale_factor=_SMALLEST / smallest, mode="bilinear")
