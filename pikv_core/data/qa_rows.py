"""Questions about contexts with their answers, and the scores of rules that do without a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from pikv_core.data import linear_spans, span_candidates, stories
from pikv_core.data.answers import exact_match, token_f1


@dataclass(frozen=True)
class Row:
    """context: a story or a docstring. start: the character at which the answer begins. kind: of the question."""

    context: str
    question: str
    answer: str
    start: int
    kind: str


Guess = Callable[[Row], str]


def rules_of_stories(train: list[Row]) -> dict[str, Guess]:
    """Return rules that do not read the question, and a linear reader of words, made for the training rows."""
    most = _most_frequent([row.answer for row in train])
    common = span_candidates.common_words(row.question for row in train)
    reader = linear_spans.fit(train, span_candidates.words({row.answer for row in train}, common))
    return {
        "most_frequent_answer": lambda row: most,
        "last_mentioned_place": lambda row: stories.last_place(row.context),
        "linear_spans": reader.answer,
    }


def rules_of_docstrings(train: list[Row]) -> dict[str, Guess]:
    """Return rules that do not understand the context, and a linear reader of phrases, made for the training rows."""
    most = _most_frequent([row.answer for row in train])
    answers: dict[str, list[str]] = {}
    for row in train:
        answers.setdefault(_quoted(row), []).append(row.answer)
    common = span_candidates.common_words(row.question for row in train)
    reader = linear_spans.fit(train, span_candidates.phrases(common))
    return {
        "most_frequent_answer": lambda row: most,
        "most_frequent_of_the_parameter": lambda row: _most_frequent(answers.get(_quoted(row), [most])),
        "rest_of_the_line": lambda row: row.context.partition(_quoted(row))[2].split("\n")[0],
        "linear_spans": reader.answer,
    }


def score(guess: Guess, rows: list[Row]) -> dict[str, Any]:
    """Return a rule's exact match and token F1, overall, and its exact match by kind."""
    given = [guess(row) for row in rows]
    matches = [exact_match(one, row.answer) for one, row in zip(given, rows, strict=True)]
    kinds = sorted({row.kind for row in rows})
    return {
        "exact_match": float(np.mean(matches)),
        "token_f1": float(np.mean([token_f1(one, row.answer) for one, row in zip(given, rows, strict=True)])),
        "exact_match_by_kind": {
            kind: float(np.mean([match for match, row in zip(matches, rows) if row.kind == kind])) for kind in kinds
        },
    }


def _most_frequent(answers: list[str]) -> str:
    """Return the most frequent answer, of equals the first in the alphabet."""
    counts = Counter(answers)
    return min(counts, key=lambda answer: (-counts[answer], answer))


def _quoted(row: Row) -> str:
    """Return the parameter that a question asks for."""
    return row.question.split("'")[1]
