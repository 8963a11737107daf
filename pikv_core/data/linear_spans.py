"""A linear reader: softmax regression on sparse features over the spans that may answer a question.

How far one gets without a model that reads; fitted to the training split, L2 weight 1/N.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pikv_core.data.answers import token_f1
from pikv_core.data.nesterov import Floats, minimise
from pikv_core.data.span_candidates import Candidate, Extract

if TYPE_CHECKING:
    from pikv_core.data.qa_rows import Row

MOST_ROWS = 2000  # that are fitted to; the first ones
STEPS = 200


@dataclass(frozen=True)
class LinearSpans:
    extract: Extract
    columns: dict[str, int]  # of each feature
    weight: Floats

    def answer(self, row: Row) -> str:
        """Return the span that scores most, or nothing where there is none to choose."""
        found = self.extract(row.context, row.question)
        if not found:
            return ""
        scores = [sum(self.weight[self.columns[one]] for one in each.features if one in self.columns) for each in found]
        best = found[int(np.argmax(scores))]
        return row.context[best.start : best.end]


@dataclass(frozen=True)
class Choices:
    """Questions and the candidates of each, in lists one after the other."""

    columns: NDArray[np.intp]  # of all features of all candidates
    of_candidates: NDArray[np.intp]  # the first feature of each
    of_questions: NDArray[np.intp]  # the first candidate of each
    right: NDArray[np.intp]  # the candidate to choose, of each question


def fit(rows: Sequence[Row], extract: Extract) -> LinearSpans:
    """Fit to rows; those of which no candidate meets the answer are left out."""
    columns: dict[str, int] = {}
    flat: list[int] = []
    of_candidates: list[int] = []
    of_questions: list[int] = []
    right: list[int] = []
    for row in rows[:MOST_ROWS]:
        found = extract(row.context, row.question)
        nearest = _nearest(row, found)
        if nearest is None:
            continue
        of_questions.append(len(of_candidates))
        right.append(len(of_candidates) + nearest)
        for each in found:
            of_candidates.append(len(flat))
            flat += [columns.setdefault(one, len(columns)) for one in each.features]
    if not right:
        return LinearSpans(extract, {}, np.zeros(0))
    choices = Choices(*(np.array(one, np.intp) for one in (flat, of_candidates, of_questions, right)))
    decay = 1 / len(right)
    # A candidate of F features has squared length F, and softmax curves by at most that.
    curvature = float(np.diff([*of_candidates, len(flat)]).max())
    start = np.zeros(len(columns))
    weight = minimise(lambda at: loss_and_gradient(at, choices, decay)[1], start, curvature, decay, STEPS)
    return LinearSpans(extract, columns, weight)


def loss_and_gradient(weight: Floats, choices: Choices, decay: float) -> tuple[float, Floats]:
    """Return the mean cross-entropy of the right candidates plus decay/2 of the squared weight, and its gradient."""
    number = len(choices.right)
    num_features = np.diff([*choices.of_candidates, len(choices.columns)])
    num_candidates = np.diff([*choices.of_questions, len(choices.of_candidates)])
    scores = np.add.reduceat(weight[choices.columns], choices.of_candidates)
    shifted = scores - np.repeat(np.maximum.reduceat(scores, choices.of_questions), num_candidates)
    totals = np.add.reduceat(np.exp(shifted), choices.of_questions)
    probs = np.exp(shifted) / np.repeat(totals, num_candidates)
    loss = float(np.mean(np.log(totals) - shifted[choices.right])) + decay / 2 * float(weight @ weight)
    probs[choices.right] -= 1
    pulled = np.bincount(choices.columns, np.repeat(probs, num_features), minlength=len(weight))
    return loss, pulled / number + decay * weight


def _nearest(row: Row, candidates: list[Candidate]) -> int | None:
    """Return which candidate is the answer, or, of those that overlap it, most like it."""
    end = row.start + len(row.answer)
    met = [number for number, one in enumerate(candidates) if one.start < end and one.end > row.start]
    likeness = [token_f1(row.context[candidates[number].start : candidates[number].end], row.answer) for number in met]
    return met[int(np.argmax(likeness))] if met else None
