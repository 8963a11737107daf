"""A context, a question and the context again ("just read twice", arXiv 2407.05483), as tokens.

A causal model that knows the question and all that is told later can point to the answer in the second copy.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pikv_core.data.token_rows import Ids
from pikv_core.errors import PiKVError


@dataclass(frozen=True)
class Question:
    """context [C] and question: token ids. offsets [C, 2]: characters. answer: its first and its last token's place."""

    context: Ids
    offsets: NDArray[np.int64]
    question: Ids
    answer: tuple[int, int]

    @property
    def num_tokens(self) -> int:
        """Return the tokens of the whole."""
        return 2 * len(self.context) + len(self.question)


@dataclass(frozen=True)
class Reading:
    """ids [T]; the second copy begins at `second` with the context's token `skipped`.

    answer: the places in ids of its first and its last token, or None where it was cut.
    """

    ids: Ids
    second: int
    skipped: int
    answer: tuple[int, int] | None


def lay_out(asked: Question, length: int) -> Reading:
    """Return a question as `length` tokens at most; of a context that is too long, a part that is like the question.

    Raises PiKVError where the question leaves no room for a context.
    """
    room = (length - len(asked.question)) // 2
    if room < 1:
        raise PiKVError(
            f"length {length} is too short for a question of {len(asked.question)} tokens and its context twice",
            hint="raise the last length of train.curriculum",
        )
    skipped = _best_part(asked.context, asked.question, room)
    context = asked.context[skipped : skipped + room]
    second = len(context) + len(asked.question)
    first, last = (place - skipped for place in asked.answer)
    whole = 0 <= first and last < len(context)
    ids = np.concatenate([context, asked.question, context])
    return Reading(ids, second, skipped, (second + first, second + last) if whole else None)


def _best_part(context: Ids, question: Ids, room: int) -> int:
    """Return where the `room` tokens begin that share most with the question, a token the more the rarer it is here.

    Of equals, the one in the middle.
    """
    if len(context) <= room:
        return 0
    counts, asked = Counter(context.tolist()), set(question.tolist())
    worth = np.array([1 / counts[token] if token in asked else 0.0 for token in context.tolist()])
    sums = np.convolve(worth, np.ones(room), "valid")
    best = np.flatnonzero(np.isclose(sums, sums.max()))
    return int(best[len(best) // 2])
