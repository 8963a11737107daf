"""Nesterov's accelerated gradient for smooth, strongly convex losses."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def minimise(
    gradient: Callable[[Floats], Floats], start: Floats, curvature: float, decay: float, num_steps: int
) -> Floats:
    """Return the weights after so many steps; `gradient` includes the L2 term of weight `decay`.

    curvature: the most that the loss without that term curves.
    """
    momentum = (1 - np.sqrt(decay / curvature)) / (1 + np.sqrt(decay / curvature))
    weight = ahead = start
    for _ in range(num_steps):
        stepped = ahead - gradient(ahead) / (curvature + decay)
        weight, ahead = stepped, stepped + momentum * (stepped - weight)
    return weight
