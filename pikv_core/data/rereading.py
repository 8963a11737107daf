"""A question and then its context, once or more ("just read twice", arXiv 2407.05483), as tokens.

A causal model that reads a context again knows what is told later when it comes to the answer.
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


@dataclass(frozen=True)
class Reading:
    """ids [T]; starts: where each copy begins, with the context's token `skipped`.

    answer: its first and its last token's place in a copy, or None where it was cut.
    """

    ids: Ids
    starts: list[int]
    skipped: int
    answer: tuple[int, int] | None


def lay_out(asked: Question, num_reads: int, length: int) -> Reading:
    """Return a question as `length` tokens at most; of a context that is too long, a part that is like the question.

    Raises PiKVError where the question leaves no room for a context.
    """
    room = (length - len(asked.question)) // num_reads
    if room < 1:
        raise PiKVError(
            f"length {length} is too short for a question of {len(asked.question)} tokens and its context",
            hint="raise the last length of train.curriculum",
        )
    skipped = _best_part(asked.context, asked.question, room)
    context = asked.context[skipped : skipped + room]
    first, last = (place - skipped for place in asked.answer)
    return Reading(
        ids=np.concatenate([asked.question, *[context] * num_reads]),
        starts=[len(asked.question) + number * len(context) for number in range(num_reads)],
        skipped=skipped,
        answer=(first, last) if 0 <= first and last < len(context) else None,
    )


def newest_first(asked: Question, ends: Ids) -> Question:
    """Return a question with the sentences of its context from the last to the first.

    ends: the characters at which sentences end. An answer of more than one sentence stays no span.
    """
    sentence = np.searchsorted(ends, asked.offsets[:, 1])
    order = np.argsort(-sentence, kind="stable")
    first, last = (int(np.flatnonzero(order == place)[0]) for place in asked.answer)
    return Question(asked.context[order], asked.offsets[order], asked.question, (first, last))


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
