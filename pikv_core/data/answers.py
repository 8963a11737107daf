"""Exact match and token F1 of an answer as SQuAD defines them (arXiv 1606.05250)."""

from __future__ import annotations

import re
import string
from collections import Counter

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(answer: str) -> str:
    """Return an answer in lower case without ASCII punctuation, the articles a, an and the, and spare spaces."""
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", answer.lower().translate(_PUNCTUATION)).split())


def exact_match(given: str, expected: str) -> bool:
    """Return whether two answers are the same once normalised."""
    return normalise(given) == normalise(expected)


def token_f1(given: str, expected: str) -> float:
    """Return the F1 of the given words against the expected ones, each counted as often as it stands.

    Where either has no word left, 1 if both have none, else 0.
    """
    ours, theirs = normalise(given).split(), normalise(expected).split()
    if not ours or not theirs:
        return float(ours == theirs)
    common = (Counter(ours) & Counter(theirs)).total()
    return 2 * common / (len(ours) + len(theirs))
