"""Exact match and token F1 by hand."""

import pytest

from pikv_core.data.answers import exact_match, normalise, token_f1
from pikv_core.errors import UsageError
from pikv_core.evaluation.spans import score


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("The  Kitchen.", "kitchen"),
        ("an apple, a day", "apple day"),
        ("thesis on anatomy", "thesis on anatomy"),
        ("don't\n stop", "dont stop"),
        ("A.", ""),
    ],
)
def test_answers_are_normalised(answer: str, normal: str) -> None:
    assert normalise(answer) == normal


@pytest.mark.parametrize(
    ("given", "expected", "match", "f1"),
    [
        ("the kitchen", "Kitchen", True, 1),
        ("red kitchen", "kitchen", False, 2 / 3),  # precision 1/2, recall 1
        ("a b c", "b c d", False, 4 / 5),  # "a" is an article: 2 of 2 given, 2 of 3 expected
        ("x x y", "x z", False, 2 / 5),  # a word counts as often as it stands on both sides
        ("garden", "kitchen", False, 0),
        ("", "the", True, 1),
        ("", "kitchen", False, 0),
    ],
)
def test_values_by_hand(given: str, expected: str, match: bool, f1: float) -> None:
    assert exact_match(given, expected) == match
    assert token_f1(given, expected) == token_f1(expected, given) == pytest.approx(f1)


def test_the_nearest_answer_counts_and_kinds_are_apart() -> None:
    given = ["red kitchen", "apple", "x"]
    found = score(given, [["garden", "kitchen"], ["pear", "the apple"], ["y"]], ["where", "what", "where"])
    assert (found.overall.exact_match, found.overall.token_f1) == pytest.approx((1 / 3, (2 / 3 + 1) / 3))
    assert {kind: (one.exact_match, one.num_samples) for kind, one in found.by_kind.items()} == {
        "what": (1, 1),
        "where": (0, 2),
    }
    assert found.by_kind["where"].token_f1 == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("given", "expected", "kinds"),
    [([], [], []), (["a"], [], []), (["a"], [["a"]], []), (["a"], [[]], ["k"])],
)
def test_what_does_not_fit_is_refused(given: list[str], expected: list[list[str]], kinds: list[str]) -> None:
    with pytest.raises(UsageError, match="answers were given for"):
        score(given, expected, kinds)
