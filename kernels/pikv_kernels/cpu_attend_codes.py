"""Attention of one new token over keys and values in KIVI's codes on a CPU, by numba.

Products run on the codes: key scales are folded into the query and value scales into the weights, a block at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np

from pikv_kernels.cpu_blocks import LOG2E, LOWEST, cap, compiled, from_half, hide, normalise, soften
from pikv_kernels.cpu_product import add_product


@lru_cache
def make_kernel(R: int, D: int, V: int, C: int, T: int, bits: int) -> Callable[..., None]:
    """Return the kernel for R query rows, D channels of a key and V in C groups of a value, and units of T tokens.

    It takes arrays [heads,·,...] and the range of heads to attend for. units: int64 [heads,K] to read of the first
    `num_units`, or [0,0] for all of these. seen: bool [·,S], one row for `heads_of_seen` heads, or [0,0] for all; probs
    [heads,R,S] or [0,0,0] for none. It writes output, probs, and the highest logit and the weights' sum [heads,R] in
    powers of two.
    """
    W = V // C
    KEY_BYTES, VALUE_BYTES = D * T * bits // 8, V * T * bits // 8
    MIDDLE = np.float32(1 << bits - 1)  # what products take off the codes

    def attend_codes(
        query, key_codes, key_scale, key_zero, value_codes, value_scale, value_zero, units, num_units,
        seen, heads_of_seen, scale, softcap, output, highest, total, probs, first_head, end_head,
    ):  # fmt: skip
        factor = np.float32(scale * LOG2E)
        scaled, logits = np.empty((R, D), np.float32), np.empty((R, T), np.float32)
        weights, zeros = np.empty((C * R, T), np.float32), np.empty((R, C), np.float32)
        dealt = np.empty((2, T * C), np.float32)
        group_scale, group_zero = np.empty((C, T), np.float32), np.empty((C, T), np.float32)
        for n in range(first_head, end_head):
            own, most, sums = output[n], highest[n], total[n]
            own[:] = np.float32(0)
            zeros[:] = np.float32(0)
            most[:] = LOWEST
            sums[:] = np.float32(0)
            num_read = units.shape[1] if len(units) else num_units
            for place in range(num_read):
                u = units[n, place] if len(units) else place
                if u >= num_units:
                    continue
                to_next = units[n, min(place + 1, num_read - 1)] - u if len(units) else 1
                of_scale, of_zero = key_scale[n, u], key_zero[n, u]
                for r in range(R):
                    row, target, added = query[n, r], scaled[r], np.float32(0)
                    for d in range(D):
                        x, step = row[d] * factor, from_half(of_scale[d])
                        target[d] = x * step
                        added += x * (from_half(of_zero[d]) + MIDDLE * step)
                    logits[r] = added
                add_product(scaled, key_codes[n, u], logits, R, D, T, 1, bits, to_next * KEY_BYTES)
                if softcap > 0:
                    cap(logits, R, T, np.float32(softcap))
                if len(seen):
                    hide(logits, seen[n // heads_of_seen, u * T : u * T + T], R, T)
                if len(probs):
                    for r in range(R):
                        probs[n, r, u * T : u * T + T] = logits[r]
                soften(logits, most, sums, own, zeros, R, T, V, C)
                of_scale, of_zero = value_scale[n, u], value_zero[n, u]
                for i in range(T * C):
                    step = from_half(of_scale[i])
                    dealt[0, i] = step
                    dealt[1, i] = from_half(of_zero[i]) + MIDDLE * step
                for c in range(C):
                    for i in range(T):
                        group_scale[c, i] = dealt[0, i * C + c]
                        group_zero[c, i] = dealt[1, i * C + c]
                    for r in range(R):
                        row, target, added = logits[r], weights[c * R + r], np.float32(0)
                        for i in range(T):
                            target[i] = row[i] * group_scale[c, i]
                            added += row[i] * group_zero[c, i]
                        zeros[r, c] += added
                add_product(weights, value_codes[n, u], own, R, T, V, C, bits, to_next * VALUE_BYTES)
            for r in range(R):
                for c in range(C):
                    for d in range(c * W, c * W + W):
                        own[r, d] += zeros[r, c]
            normalise(own, most, sums, probs, n, R)

    return compiled(attend_codes)
