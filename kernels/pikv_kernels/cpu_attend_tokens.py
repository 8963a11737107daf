"""Attention of one new token over keys and values in float32, bfloat16, float16 or e4m3 on a CPU, by numba."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np

from pikv_kernels.cpu_blocks import LOG2E, LOWEST, cap, compiled, hide, multiply, normalise, soften
from pikv_kernels.cpu_product import add_product, write_dots


@lru_cache
def make_kernel(R: int, D: int, V: int, T: int) -> Callable[..., None]:
    """Return the kernel for R query rows, D channels of a key and V of a value, and T tokens at a time.

    It takes arrays [heads,·,...] and the range of heads to attend for. pages: int64 [heads,K] of T tokens each to read
    of the first `num_tokens`, -1 for none, or [0,0] for all of these. seen: bool [·,S], one row for `heads_of_seen`
    heads, or [0,0] for all; probs [heads,R,S] or [0,0,0] for none. key_scale, value_scale: float32 [heads,·], a number
    for each T tokens, or [0,0] for none. It writes output, probs, and the highest logit and the weights' sum [heads,R]
    in powers of two.
    """
    AHEAD = 4096  # bytes, where what follows lies behind

    def attend_tokens(
        query, keys, values, key_scale, value_scale, pages, num_tokens, seen, heads_of_seen, scale, softcap,
        output, highest, total, probs, first_head, end_head,
    ):  # fmt: skip
        factor = np.float32(scale * LOG2E)
        scaled, logits = np.empty((R, D), np.float32), np.empty((R, T), np.float32)
        nothing = np.empty((R, 0), np.float32)
        for n in range(first_head, end_head):
            own, most, sums = output[n], highest[n], total[n]
            own[:] = np.float32(0)
            most[:] = LOWEST
            sums[:] = np.float32(0)
            for r in range(R):
                for d in range(D):
                    scaled[r, d] = query[n, r, d] * factor
            num_blocks = pages.shape[1] if len(pages) else (num_tokens + T - 1) // T
            key_ahead, value_ahead = AHEAD, AHEAD
            for place in range(num_blocks):
                start = pages[n, place] * T if len(pages) else place * T
                end = min(start + T, num_tokens)
                if start < 0 or start >= end:
                    continue
                if len(pages):
                    to_next = pages[n, min(place + 1, num_blocks - 1)] * T - start
                    key_ahead, value_ahead = to_next * D * keys.itemsize, to_next * V * values.itemsize
                write_dots(scaled, keys[n, start:end], logits, R, end - start, D, key_ahead)
                if len(key_scale):
                    multiply(logits, key_scale[n, start // T], R, end - start)
                if softcap > 0:
                    cap(logits, R, end - start, np.float32(softcap))
                if len(seen):
                    hide(logits, seen[n // heads_of_seen, start:end], R, end - start)
                if len(probs):
                    for r in range(R):
                        for i in range(end - start):
                            probs[n, r, start + i] = logits[r, i]
                soften(logits, most, sums, own, nothing, R, end - start, V, 0)
                if len(value_scale):
                    multiply(logits, value_scale[n, start // T], R, end - start)
                add_product(logits, values[n, start:end], own, R, end - start, V, 1, 8, value_ahead)
            normalise(own, most, sums, probs, n, R)

    return compiled(attend_tokens)
