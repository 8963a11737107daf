"""Score the labels that a classifier gives: accuracy, and F1 averaged over the classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

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
    classes = sorted({*given, *expected})
    number = {label: index for index, label in enumerate(classes)}
    a, b = (np.array([number[label] for label in labels]) for labels in (given, expected))
    right = np.bincount(a[a == b], minlength=len(classes))
    f1 = 2 * right / (np.bincount(a, minlength=len(classes)) + np.bincount(b, minlength=len(classes)))
    by_class = dict(zip(classes, f1.tolist(), strict=True))
    return Score(float(np.mean(a == b)), float(f1.mean()), by_class, len(expected))
