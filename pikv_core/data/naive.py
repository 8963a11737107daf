"""Forecasts without a model, and the errors that any forecast is told by.

Shapes: N windows, C values of context, H steps ahead, all of the same series and one value a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pikv_core.errors import UsageError


@dataclass(frozen=True)
class Errors:
    """The mean squared and the mean absolute error over the first `horizon` steps of all windows."""

    horizon: int
    mse: float
    mae: float


def errors(forecast: NDArray[np.floating], future: NDArray[np.floating], horizons: Sequence[int]) -> list[Errors]:
    """Return the errors of a forecast [N,H] of the future [N,H] for each horizon up to H, in the order given."""
    if forecast.shape != future.shape:
        raise UsageError(f"a forecast of shape {forecast.shape} for a future of shape {future.shape}")
    if not horizons or min(horizons) < 1 or max(horizons) > future.shape[1]:
        raise UsageError(f"horizons: expected steps from 1 to {future.shape[1]}, got {list(horizons)}")
    difference = forecast.astype(np.float64) - future
    return [
        Errors(steps, float(np.mean(difference[:, :steps] ** 2)), float(np.mean(np.abs(difference[:, :steps]))))
        for steps in horizons
    ]


def naive(context: NDArray[np.floating], num_steps: int) -> NDArray[np.floating]:
    """Repeat the last value of each context [N,C] for num_steps; returns [N,H]."""
    return np.repeat(context[:, -1:], num_steps, axis=1)


def seasonal_naive(context: NDArray[np.floating], num_steps: int, period: int) -> NDArray[np.floating]:
    """Repeat the last `period` values of each context [N,C] for num_steps; returns [N,H]."""
    if not 1 <= period <= context.shape[1]:
        raise UsageError(f"a period of {period} steps does not fit a context of {context.shape[1]}")
    return context[:, context.shape[1] - period + np.arange(num_steps) % period]
