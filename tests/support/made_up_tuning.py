"""Probes and points of a tuning with numbers of a test's own."""

import numpy as np

from vsa_diffusers.tuning import Point
from vsa_diffusers.tuning.probe import RATIOS, Probe, Tiling


def made_up(errors, gains=1.0, total=4, tiles=100):
    """A probe of layers whose error falls from what is given, at the lowest ratio, on a line to none."""
    line = (1 - np.array(RATIOS)) / (1 - RATIOS[0])
    of_layers = np.array(errors)[:, None, None] * np.ones((1, 2, 1)) * line
    names = tuple(f"blocks.{place}.attn1" for place in range(len(errors)))
    tiling = Tiling("auto", "quarters", 0.1, 0.2)
    steps = (0, total - 1)
    return Probe(
        names, steps, total, tiles, tiles, tiling, of_layers, np.full(of_layers.shape[:2], gains), {}, 0.0, 0.0
    )


def point(name="a", cost=0.2, psnr=30.0, schedule="front", allocation=None, **others):
    numbers = dict(ssim=0.9, speedup=1.2, error=None) | others
    return Point(name, schedule, {}, cost, cost, psnr, allocation=allocation, **numbers)
