"""Score the labels that a classifier gives: accuracy, and F1 averaged over the classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pikv_core.data.class_f1 import f1_by_class
from pikv_core.errors import UsageError


@dataclass(frozen=True)
class Score:
    """macro_f1: the mean of f1_by_class, every class alike however many samples it has."""

    accuracy: float
    macro_f1: float
    f1_by_class: dict[str, float]
    num_samples: int


def score(given: Sequence[str], expected: Sequence[str]) -> Score:
    """Score labels against the expected ones, one of each a sample.

    A class is a label that stands on either side; its F1 is 2·right / (given + expected), so that one that is only
    given or only expected counts as 0. Raises UsageError where the two differ in number or are empty.
    """
    if len(given) != len(expected) or not expected:
        raise UsageError(f"{len(given)} labels were given for {len(expected)} samples", hint="give one for each")
    by_class = f1_by_class(given, expected)
    accuracy = float(np.mean([one == other for one, other in zip(given, expected)]))
    return Score(accuracy, float(np.mean(list(by_class.values()))), by_class, len(expected))
