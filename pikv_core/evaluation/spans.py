"""Score answers that are spans of a text: exact match and token F1 as SQuAD defines them (arXiv 1606.05250).

Both sides are normalised first: lower case, no ASCII punctuation, no articles, single spaces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pikv_core.data.answers import exact_match, token_f1
from pikv_core.errors import UsageError


@dataclass(frozen=True)
class Share:
    """Means over samples, in [0, 1]."""

    exact_match: float
    token_f1: float
    num_samples: int


@dataclass(frozen=True)
class Score:
    overall: Share
    by_kind: dict[str, Share]


def score(given: Sequence[str], expected: Sequence[Sequence[str]], kinds: Sequence[str]) -> Score:
    """Score answers against one or more right ones each, of which the nearest counts.

    kinds: of the questions. Raises UsageError where the numbers differ, are 0, or a question has no right answer.
    """
    if not len(given) == len(expected) == len(kinds) or not given or not all(expected):
        raise UsageError(
            f"{len(given)} answers were given for {len(expected)} questions of {len(kinds)} kinds",
            hint="give one answer and one kind a question, and at least one right answer",
        )
    points = np.array(
        [
            (max(exact_match(answer, one) for one in right), max(token_f1(answer, one) for one in right))
            for answer, right in zip(given, expected)
        ],
        np.float64,
    )
    is_kind = {kind: np.array([one == kind for one in kinds]) for kind in sorted(set(kinds))}
    return Score(_share(points), {kind: _share(points[rows]) for kind, rows in is_kind.items()})


def _share(points: np.ndarray) -> Share:
    match, f1 = points.mean(axis=0).tolist()
    return Share(match, f1, len(points))
