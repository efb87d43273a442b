"""Rows of handwritten digits from scikit-learn's bundled scans (UCI Optical Recognition of Handwritten Digits, CC BY 4.0).

A digit fills 28 x 28 pixels: with 14-pixel patches merged 2 x 2 that is exactly one image token of the policy.
"""
from __future__ import annotations

import math
import random
from collections.abc import Sequence
from functools import cache
from typing import Literal

import numpy as np
from PIL import Image

Split = Literal["train", "eval"]
CELL = 28       # pixels a side of one digit
SCAN = 8        # pixels a side of one scan
HELD_OUT = 357  # of 1,797 scans; fixed for every seed, so that no run ever trains on another run's held-out scans


@cache
def _scans() -> tuple[list[Image.Image], list[int]]:
    from sklearn.datasets import load_digits

    bundle = load_digits()
    pixels = np.clip(np.rint(bundle.images * (255 / 16)), 0, 255).astype(np.uint8)  # 16 grey levels
    return [Image.fromarray(p) for p in pixels], [int(d) for d in bundle.target]


@cache
def scans_by_digit(split: Split) -> dict[int, tuple[int, ...]]:
    """Indices into the bundle of the scans of each digit in one split; the two splits share none."""
    _, labels = _scans()
    order = np.random.RandomState(0).permutation(len(labels))
    mine = order[-HELD_OUT:] if split == "eval" else order[:-HELD_OUT]
    return {d: tuple(int(i) for i in sorted(mine) if labels[i] == d) for d in range(10)}


def row(digits: Sequence[int], split: Split, rng: random.Random) -> tuple[Image.Image, list[int]]:
    """A grey picture of len(digits) * 28 x 28 pixels and the scans it shows; training scans are bent a little."""
    images, _ = _scans()
    chosen = [rng.choice(scans_by_digit(split)[d]) for d in digits]
    picture = Image.new("L", (CELL * len(digits), CELL))
    for place, scan in enumerate(chosen):
        bend = _bend(rng) if split == "train" else _affine()
        cell = images[scan].transform((CELL, CELL), Image.Transform.AFFINE, bend, resample=Image.Resampling.BILINEAR)
        picture.paste(cell, (CELL * place, 0))
    return picture, chosen


def _bend(rng: random.Random) -> tuple[float, ...]:
    """Up to 10 degrees, an eighth in size, 10 % of shear and half a scan pixel of shift."""
    return _affine(angle=rng.uniform(-0.175, 0.175), scale=rng.uniform(0.875, 1.125), shear=rng.uniform(-0.1, 0.1),
                   shift=(rng.uniform(-0.6, 0.6), rng.uniform(-0.6, 0.6)))


def _affine(angle: float = 0.0, scale: float = 1.0, shear: float = 0.0, shift: tuple[float, float] = (0.0, 0.0)) -> tuple[float, ...]:
    """Pillow's six coefficients: pixel (x, y) of the cell is read at (a x + b y + c, d x + e y + f) of the scan, about the centres."""
    zoom = SCAN / CELL * scale
    a, b = math.cos(angle) * zoom, (shear - math.sin(angle)) * zoom
    d, e = math.sin(angle) * zoom, math.cos(angle) * zoom
    middle = CELL / 2
    return a, b, SCAN / 2 + shift[0] - (a + b) * middle, d, e, SCAN / 2 + shift[1] - (d + e) * middle
