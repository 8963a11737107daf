"""The size of a test split, and splits that hold every class in its share."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.intp]


def num_held_out(share: float, num_samples: int) -> int:
    """Return the samples of the test split: one at least, and one at least is left to train on; of 2 or more."""
    return min(max(1, round(share * num_samples)), num_samples - 1)


def split(
    labels: NDArray[np.int64], num_samples: int, num_test: int, rng: np.random.Generator
) -> tuple[Indices, Indices]:
    """Draw num_samples of labels [N]; return the sorted indices of the training and of the test split.

    Each class is within one sample of its share of all that is drawn, and of the test split within that.
    """
    drawn = _draw(labels, np.arange(len(labels)), num_samples, rng)
    test = _draw(labels, drawn, num_test, rng)
    return np.setdiff1d(drawn, test, assume_unique=True), test


def _draw(labels: NDArray[np.int64], among: Indices, number: int, rng: np.random.Generator) -> Indices:
    """Return `number` of the indices, by largest remainder over the classes, sorted."""
    classes, counts = np.unique(labels[among], return_counts=True)
    share = counts * number / len(among)
    taken = np.floor(share).astype(int)
    taken[np.argsort(taken - share, kind="stable")[: number - taken.sum()]] += 1
    parts = [
        rng.choice(among[labels[among] == label], size, replace=False)
        for label, size in zip(classes, taken, strict=True)
    ]
    return np.sort(np.concatenate(parts))
