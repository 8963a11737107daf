"""Score a forecast, for each horizon, against the naive and the seasonal-naive one.

Errors of series in other units do not compare; the skill 1 - mse / mse of the reference does: 1 is perfect, 0 is no
better than the reference, and below 0 is worse.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pikv_core.data.naive import errors, naive, seasonal_naive


@dataclass(frozen=True)
class Score:
    """The errors over the first `horizon` steps, and the skill over each reference: None where that has no error."""

    horizon: int
    mse: float
    mae: float
    skill_naive: float | None
    skill_seasonal: float | None


def score(
    forecast: NDArray[np.floating],
    context: NDArray[np.floating],
    future: NDArray[np.floating],
    horizons: Sequence[int],
    period: int,
) -> list[Score]:
    """Score a forecast [N,H] of the future [N,H] after the context [N,C], in the units of the series.

    period: steps of a season, at most C. Raises UsageError where shapes, horizons or period do not fit.
    """
    num_steps = future.shape[1]
    own = errors(forecast, future, horizons)
    last = errors(naive(context, num_steps), future, horizons)
    season = errors(seasonal_naive(context, num_steps, period), future, horizons)
    return [
        Score(a.horizon, a.mse, a.mae, _skill(a.mse, b.mse), _skill(a.mse, c.mse))
        for a, b, c in zip(own, last, season, strict=True)
    ]


def _skill(mse: float, reference: float) -> float | None:
    return 1 - mse / reference if reference else None
