"""Small drawn changes of images, as augmentation. N images, H and W pixels."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def warp(
    rng: np.random.Generator, images: NDArray[np.float32], turn: float, stretch: float, shift: float
) -> NDArray[np.float32]:
    """Turn, stretch and shift each of images [N,H,W], by bilinear interpolation; zeros come in from outside.

    Drawn evenly for each image: an angle of up to `turn` degrees, a factor of up to 1 ± `stretch` for each axis, and
    up to `shift` pixels along each. With all at 0 the images stay as they are.
    """
    number, height, width = images.shape
    angle = np.deg2rad(rng.uniform(-turn, turn, number))
    factors = 1 + rng.uniform(-stretch, stretch, (number, 2))
    shifts = rng.uniform(-shift, shift, (number, 2))
    center = np.array([height - 1, width - 1]) / 2
    grid = np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing="ij"), -1).reshape(-1, 2) - center
    turns = np.stack([np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)], -1).reshape(number, 2, 2)
    places = np.einsum("nij,pj->npi", turns * factors[:, :, None], grid) + center + shifts[:, None]
    return _read(images, places).reshape(images.shape).astype(np.float32)


def _read(images: NDArray[np.float32], places: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the values of images [N,H,W] at places [N,P,2] between their pixels, as [N,P]."""
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1)))
    most = np.array(padded.shape[1:]) - 1
    at = np.clip(places + 1, 0, most)
    low = np.minimum(at.astype(int), most - 1)
    part = at - low
    row = np.arange(len(images))[:, None]
    values = np.zeros(places.shape[:2])
    for down in (0, 1):
        for right in (0, 1):
            weight = np.abs(1 - down - part[..., 0]) * np.abs(1 - right - part[..., 1])
            values += weight * padded[row, low[..., 0] + down, low[..., 1] + right]
    return values
