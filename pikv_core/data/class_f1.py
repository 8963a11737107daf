"""F1 of labels that were given for expected ones, by class."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def f1_by_class(given: Sequence[str], expected: Sequence[str]) -> dict[str, float]:
    """Return 2·right / (given + expected) of each class, a label that stands on either side.

    One that is only given or only expected has 0. Both sides are as long.
    """
    classes = sorted({*given, *expected})
    number = {label: index for index, label in enumerate(classes)}
    a, b = (np.array([number[label] for label in labels]) for labels in (given, expected))
    right = np.bincount(a[a == b], minlength=len(classes))
    f1 = 2 * right / (np.bincount(a, minlength=len(classes)) + np.bincount(b, minlength=len(classes)))
    return dict(zip(classes, f1.tolist(), strict=True))
