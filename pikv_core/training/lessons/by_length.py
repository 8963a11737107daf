"""Rows of a step that are about as long as each other, so that little of a batch is padding."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pikv_core.training.lessons.base import epoch_rows

BATCHES_SORTED = 8  # together


def rows_of_step(seed: int, step: int, num_rows: int, lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    """Return the rows of a step, a function of the arguments alone; lengths: of all rows.

    The rows of some steps, drawn as `epoch_rows` does, are parted by length, and the parts taken in a drawn order.
    """
    turn, place = divmod(step, BATCHES_SORTED)
    rows = epoch_rows(seed, turn, num_rows * BATCHES_SORTED, len(lengths))
    parts = rows[np.argsort(np.asarray(lengths)[rows], kind="stable")].reshape(BATCHES_SORTED, num_rows)
    return parts[np.random.default_rng([seed, turn, 1]).permutation(BATCHES_SORTED)[place]]
