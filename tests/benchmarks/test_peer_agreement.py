"""The agreement of two choices of tokens: what is shared, what a tie explains, what nothing explains."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.peers.agreement import compare


def best(score: np.ndarray, num_kept: int, key: np.ndarray | None = None) -> np.ndarray:
    """Return the positions of the largest scores; where they are equal, those with the larger key come first."""
    second = np.zeros(len(score)) if key is None else key
    return np.lexsort((-second, -score))[:num_kept]


@pytest.mark.parametrize("seed", range(5))
def test_any_choice_among_equal_scores_agrees(seed: int) -> None:
    rng = np.random.default_rng(seed)
    heads = []
    for _ in range(6):
        score = rng.integers(0, 4, 50).astype(np.float32)
        heads.append((best(score, 20, rng.random(50)), best(score, 20, rng.random(50)), score))
    found = compare(heads)
    assert found.share == 1 and found.num_other == 0 and found.largest_gap == 0
    assert found.num_shared == sum(len(set(theirs) & set(ours)) for theirs, ours, _ in heads)
    assert 0 < found.num_ties == found.num_kept - found.num_shared


@pytest.mark.parametrize("num_swapped", [1, 3])
def test_worse_tokens_are_no_ties(num_swapped: int) -> None:
    score = np.linspace(1, 2, 40, dtype=np.float32)
    theirs = best(score, 10)
    ours = np.concatenate([theirs[num_swapped:], np.arange(num_swapped)])
    found = compare([(theirs, ours, score)])
    assert (found.num_shared, found.num_ties, found.num_other) == (10 - num_swapped, 0, num_swapped)
    assert found.largest_gap == pytest.approx((score[theirs].min() - score[0]) / score[theirs].min())


def test_a_tied_token_cannot_excuse_a_worse_one() -> None:
    score = np.asarray([5, 4, 3, 3, 1], dtype=np.float32)
    found = compare([(np.asarray([0, 1, 2]), np.asarray([0, 2, 4]), score)])
    assert (found.num_shared, found.num_ties, found.num_other) == (2, 0, 1)
    found = compare([(np.asarray([0, 1, 2]), np.asarray([0, 1, 4]), score)])
    assert (found.num_ties, found.num_other) == (0, 1)


def test_unequal_counts_are_told() -> None:
    score = np.ones(6, dtype=np.float32)
    found = compare([(np.arange(4), np.arange(3), score), (np.arange(4), np.arange(4), score)])
    assert (found.num_unequal_heads, found.num_shared, found.num_ties, found.num_other) == (1, 7, 0, 1)
