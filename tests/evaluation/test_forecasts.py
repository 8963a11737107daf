"""Errors and skills of forecasts, against values worked out by hand."""

import numpy as np
import pytest

from pikv_core.data.naive import Errors, errors, naive, seasonal_naive
from pikv_core.errors import UsageError
from pikv_core.evaluation.forecasts import Score, score

CONTEXT = np.array([[1.0, 2.0, 5.0, 3.0], [0.0, 4.0, 1.0, 2.0]])
FUTURE = np.array([[4.0, 3.0, 4.0], [2.0, 4.0, 0.0]])


def test_naive_forecasts():
    assert naive(CONTEXT, 3).tolist() == [[3, 3, 3], [2, 2, 2]]
    assert seasonal_naive(CONTEXT, 3, 2).tolist() == [[5, 3, 5], [1, 2, 1]]
    assert seasonal_naive(CONTEXT, 6, 4).tolist() == [[1, 2, 5, 3, 1, 2], [0, 4, 1, 2, 0, 4]]
    assert seasonal_naive(CONTEXT, 3, 1).tolist() == naive(CONTEXT, 3).tolist()


def test_errors_are_means_over_the_first_steps():
    forecast = np.array([[3.0, 5.0, 4.0], [2.0, 1.0, 2.0]])
    # differences: -1 2 0 and 0 -3 2
    assert errors(forecast, FUTURE, [1, 2, 3]) == [Errors(1, 0.5, 0.5), Errors(2, 3.5, 1.5), Errors(3, 3.0, 8 / 6)]
    assert errors(forecast, FUTURE, [3, 1]) == [Errors(3, 3.0, 8 / 6), Errors(1, 0.5, 0.5)]


def test_errors_are_worked_out_in_double_precision():
    forecast, future = np.full((1, 1), 16777216, np.float32), np.full((1, 1), 16777217, np.float64)
    assert errors(forecast, future, [1]) == [Errors(1, 1.0, 1.0)]


def test_skill_compares_with_the_references():
    forecast = np.array([[4.0, 3.0, 5.0], [2.0, 2.0, 0.0]])
    # squared: own 0 0 1, 0 4 0; naive 1 0 1, 0 4 4; seasonal 1 0 1, 1 4 1
    assert score(forecast, CONTEXT, FUTURE, [1, 2, 3], 2) == [
        Score(1, 0.0, 0.0, 1.0, 1.0),
        Score(2, 1.0, 0.5, pytest.approx(1 - 4 / 5), pytest.approx(1 - 4 / 6)),
        Score(3, 5 / 6, 0.5, pytest.approx(1 - 5 / 10), pytest.approx(1 - 5 / 8)),
    ]
    assert [row.skill_naive for row in score(naive(CONTEXT, 3), CONTEXT, FUTURE, [1, 3], 2)] == [0, 0]
    worse = score(FUTURE + 10, CONTEXT, FUTURE, [3], 2)[0]
    assert worse.skill_naive == pytest.approx(1 - 100 / (10 / 6))


def test_a_perfect_reference_leaves_no_skill():
    future = naive(CONTEXT, 3)
    found = score(future + 1, CONTEXT, future, [3], 4)[0]
    assert found.skill_naive is None
    assert found.skill_seasonal is not None


@pytest.mark.parametrize("horizons", [[], [0, 1], [4]])
def test_horizons_have_to_fit(horizons):
    with pytest.raises(UsageError, match="horizons: expected steps from 1 to 3"):
        errors(FUTURE, FUTURE, horizons)


def test_shapes_and_periods_have_to_fit():
    with pytest.raises(UsageError, match=r"\(2, 2\) for a future of shape \(2, 3\)"):
        errors(FUTURE[:, :2], FUTURE, [1])
    for period in (0, 5):
        with pytest.raises(UsageError, match=f"a period of {period} steps does not fit a context of 4"):
            score(FUTURE, CONTEXT, FUTURE, [1], period)
