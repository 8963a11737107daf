"""Attention of one new token over keys that are rebuilt from coordinates and rotated on the way, on a CPU, by numba."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

from pikv_kernels.cpu_blocks import (
    LOG2E,
    LOWEST,
    cap,
    compiled,
    from_half,
    from_upper_half,
    hide,
    inlined,
    normalise,
    soften,
)
from pikv_kernels.cpu_product import add_product, write_dots

ROWS = 4  # tokens whose keys are summed at once
AHEAD = 4096  # bytes
ITSELF = 0  # what is in the caches already


@lru_cache
def make_kernel(R: int, D: int, P: int, K: int, V: int, T: int, kind: str | int, C: int = 0) -> Callable[..., None]:
    """Return the kernel for R query rows, D channels of a key, of which i and P/2 + i rotate together up to P, K
    coordinates of a key, V of a value, and T tokens at a time.

    kind: what holds the coordinates, "float32", the bits of "bfloat16" or "float16", or how many bits KIVI's codes
    have, in units of T tokens, values in C groups. The kernel takes `keys` and `values` as tuples of arrays
    [heads,·,...], numbers, or codes, scales and zero points, and the range of heads to attend for. up: [heads,K,D].
    turns: [·,P], the cosines, then the sines of a position's angles; position: int32 [·,S], one row for
    `heads_of_position` heads. All tokens are read, whatever `pages`; seen and what is written: see
    `cpu_attend_tokens`. All heads attend to a block before the next, while the caches hold its turns.
    """
    H, padded = P // 2, -(-T // ROWS) * ROWS
    if isinstance(kind, int):
        take_keys, take_values = _key_codes(K, T, kind), _value_codes(V, C, T, kind)
    else:
        take_keys, take_values = _numbers_to_rows(K, kind), _as_they_are

    def attend_rebuilt(
        query, keys, values, up, turns, position, heads_of_position, pages, num_tokens, seen, heads_of_seen, scale,
        softcap, output, highest, total, probs, first_head, end_head,
    ):  # fmt: skip
        factor = np.float32(scale * LOG2E)
        scaled, logits = np.empty((R, D), np.float32), np.empty((R, T), np.float32)
        rows, rebuilt = np.zeros((padded, K), np.float32), np.empty((padded, D), np.float32)
        room, nothing = np.empty((T, V), np.float32), np.empty((R, 0), np.float32)
        output[first_head:end_head] = np.float32(0)
        highest[first_head:end_head] = LOWEST
        total[first_head:end_head] = np.float32(0)
        for start in range(0, num_tokens, T):
            end = min(start + T, num_tokens)
            for n in range(first_head, end_head):
                for r in range(R):
                    for d in range(D):
                        scaled[r, d] = query[n, r, d] * factor
                take_keys(keys, n, start, end, rows)
                rebuilt[:] = np.float32(0)
                for i in range(0, end - start, ROWS):
                    add_product(rows[i : i + ROWS], up[n], rebuilt[i : i + ROWS], ROWS, K, D, 1, 8, ITSELF)
                own_position = position[n // heads_of_position]
                for i in range(end - start):
                    key, turn = rebuilt[i], turns[max(own_position[start + i], 0)]
                    for h in range(H):
                        x, y = key[h], key[H + h]
                        key[h] = x * turn[h] - y * turn[H + h]
                        key[H + h] = y * turn[h] + x * turn[H + h]
                write_dots(scaled, rebuilt[: end - start], logits, R, end - start, D, ITSELF)
                if softcap > 0:
                    cap(logits, R, end - start, np.float32(softcap))
                if len(seen):
                    hide(logits, seen[n // heads_of_seen, start:end], R, end - start)
                if len(probs):
                    for r in range(R):
                        for i in range(end - start):
                            probs[n, r, start + i] = logits[r, i]
                soften(logits, highest[n], total[n], output[n], nothing, R, end - start, V, 0)
                add_product(logits, take_values(values, n, start, end, room), output[n], R, end - start, V, 1, 8, AHEAD)
        for n in range(first_head, end_head):
            normalise(output[n], highest[n], total[n], probs, n, R)

    return compiled(attend_rebuilt)


def _numbers_to_rows(K: int, kind: str) -> Any:
    convert = {"float32": _same, "bfloat16": from_upper_half, "float16": from_half}[kind]

    @inlined
    def take(stored, n, start, end, rows):
        for i in range(end - start):
            row, target = stored[0][n, start + i], rows[i]
            for k in range(K):
                target[k] = convert(row[k])

    return take


@inlined
def _same(x):
    return x


@inlined
def _as_they_are(stored, n, start, end, room):
    return stored[0][n, start:end]


def _key_codes(K: int, T: int, bits: int) -> Any:
    """Codes [K,·] of a unit with scale and zero point [K]."""
    W, MASK = T * bits // 8, (1 << bits) - 1

    @inlined
    def take(stored, n, start, end, rows):
        codes, scale, zero = stored[0][n, start // T], stored[1][n, start // T], stored[2][n, start // T]
        for k in range(K):
            step, base, row = from_half(scale[k]), from_half(zero[k]), codes[k]
            for part in range(8 // bits):
                for i in range(W):
                    rows[part * W + i, k] = np.float32((row[i] >> part * bits) & MASK) * step + base

    return take


def _value_codes(V: int, C: int, T: int, bits: int) -> Any:
    """Codes [T,·] of a unit with scale and zero point [T·C]."""
    W, MASK, GROUP = V * bits // 8, (1 << bits) - 1, V // max(C, 1)

    @inlined
    def take(stored, n, start, end, room):
        codes, scale, zero = stored[0][n, start // T], stored[1][n, start // T], stored[2][n, start // T]
        for i in range(T):
            row, target = codes[i], room[i]
            for part in range(8 // bits):
                for w in range(W):
                    target[part * W + w] = np.float32((row[w] >> part * bits) & MASK)
            for c in range(C):
                step, base = from_half(scale[i * C + c]), from_half(zero[i * C + c])
                for v in range(c * GROUP, c * GROUP + GROUP):
                    target[v] = target[v] * step + base
        return room

    return take
