"""Accuracy and macro F1 by hand."""

import pytest

from pikv_core.errors import UsageError
from pikv_core.evaluation.classification import score


def test_values_by_hand() -> None:
    found = score(given=list("aabbc"), expected=list("abbbd"))
    assert found.accuracy == 3 / 5
    # a: precision 1/2, recall 1; b: precision 1, recall 2/3; c is never expected, d never given.
    assert found.f1_by_class == pytest.approx({"a": 2 / 3, "b": 4 / 5, "c": 0, "d": 0})
    assert found.macro_f1 == pytest.approx((2 / 3 + 4 / 5) / 4)
    assert found.num_samples == 5


def test_a_small_class_weighs_as_much_as_a_large_one() -> None:
    found = score(given=["a"] * 100, expected=["a"] * 99 + ["b"])
    assert found.accuracy == 0.99
    assert found.macro_f1 == pytest.approx(99 / 199)


@pytest.mark.parametrize(("given", "expected"), [([], []), (["a"], ["a", "b"])])
def test_unequal_numbers_are_refused(given: list[str], expected: list[str]) -> None:
    with pytest.raises(UsageError, match="labels were given for"):
        score(given, expected)
