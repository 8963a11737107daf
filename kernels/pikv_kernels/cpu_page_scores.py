"""Upper bounds of the attention logits of pages of keys on a CPU, by numba."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np

from pikv_kernels.cpu_blocks import compiled
from pikv_kernels.cpu_product import write_dots


@lru_cache
def make_kernel(D: int) -> Callable[..., None]:
    """Return the kernel for D channels: positive and negative parts of queries [heads,1,D], bounds [heads,·,D]."""
    AHEAD = 4096

    def page_scores(positive, negative, lowest, highest, num_pages, scores, first_head, end_head):
        below = np.empty((1, num_pages), np.float32)
        for n in range(first_head, end_head):
            write_dots(negative[n], lowest[n], below, 1, num_pages, D, AHEAD)
            write_dots(positive[n], highest[n], scores[n], 1, num_pages, D, AHEAD)
            row, low = scores[n, 0], below[0]
            for page in range(num_pages):
                row[page] += low[page]

    return compiled(page_scores)
