"""What attention of one new token on a CPU is made of: pieces that numba inlines into a kernel.

Shapes: R query rows, T tokens of a block, D head dim. Sizes are constants where a kernel is compiled, so that loops
unroll. Logits are in powers of two. NaN among the numbers is not looked for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit

LOG2E = 1.4426950408889634
LOWEST = np.float32(-1e30)  # logit of what is not seen
_FAST = {"nnan", "nsz", "arcp", "contract", "afn", "reassoc"}
_OPTIONS: dict[str, Any] = {"fastmath": _FAST, "nogil": True, "boundscheck": False, "error_model": "numpy"}
inlined = njit(forceinline=True, **_OPTIONS)


def compiled(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Return a kernel compiled, and kept on disk in the `__pycache__` beside its file, or in NUMBA_CACHE_DIR.

    numba's cache notices a change of the kernel's own file alone; the name it is kept under therefore carries a digest
    of the files whose pieces are inlined.
    """
    pieces = sorted(Path(__file__).parent.glob("cpu_*.py"))
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in pieces)).hexdigest()[:12]
    kernel.__qualname__ = f"{kernel.__name__}_{digest}"
    try:
        return njit(cache=True, **_OPTIONS)(kernel)
    except RuntimeError:  # no folder for the cache can be written
        return njit(**_OPTIONS)(kernel)


@inlined
def power(x):
    """Return 2^n and 2^(x-n) - 1 of x up to 0, n the whole number next to it; numba has no vectorised power.

    The polynomial is a least-maximum fit of its own on [-0.5,0.5], to within 9.2e-8 of 2^x.
    """
    x = max(x, np.float32(-126.0))
    whole = np.int32(x - np.float32(0.5))
    f = x - np.float32(whole)
    p = np.float32(0.0013264729)
    p = p * f + np.float32(0.009671513)
    p = p * f + np.float32(0.0555073374)
    p = p * f + np.float32(0.240222421)
    p = p * f + np.float32(0.693146978)
    return np.int32((whole + np.int32(127)) << np.int32(23)).view(np.float32), p * f


@inlined
def exp2(x):
    """Return 2^x of x up to 0."""
    scale, rest = power(x)
    return scale + scale * rest


@inlined
def from_half(bits):
    """Return the number with these bits of a finite float16."""
    wide = np.uint32(bits)
    moved = np.uint32(((wide & np.uint32(0x8000)) << np.uint32(16)) | ((wide & np.uint32(0x7FFF)) << np.uint32(13)))
    return moved.view(np.float32) * np.float32(2.0**112)


@inlined
def from_upper_half(bits):
    """Return the number with these bits of bfloat16."""
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


@inlined
def multiply(rows, factor, R, num_tokens):
    """Multiply rows [R,T] by a number."""
    for r in range(R):
        row = rows[r]
        for i in range(num_tokens):
            row[i] *= factor


@inlined
def hide(logits, seen, R, num_tokens):
    """Take tokens that are not `seen` [T] from the logits [R,T]."""
    for r in range(R):
        row = logits[r]
        for i in range(num_tokens):
            row[i] = row[i] if seen[i] else LOWEST


@inlined
def cap(logits, R, num_tokens, softcap):
    """Apply a soft cap to logits [R,T], which are in powers of two."""
    for r in range(R):
        row = logits[r]
        for i in range(num_tokens):
            x = row[i] / softcap  # log2(e) times the argument of tanh, which is (1 - 4^-x) / (1 + 4^-x)
            scale, rest = power(np.float32(-2) * abs(x))
            less_one = (scale - np.float32(1)) + scale * rest  # exact where the power is near 1
            tanh = -less_one / (np.float32(2) + less_one)
            row[i] = np.float32(LOG2E) * softcap * (tanh if x >= 0 else -tanh)


@inlined
def greatest(row, num_tokens):
    """Return the largest of a row's numbers, compared as integers of the same order: numba's `max` runs one by one."""
    most = np.int32(-(2**31))
    for i in range(num_tokens):
        bits = np.float32(row[i]).view(np.int32)
        bits = np.int32(bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))
        most = bits if bits > most else most
    return np.int32(most ^ ((most >> np.int32(31)) & np.int32(0x7FFFFFFF))).view(np.float32)


@inlined
def soften(logits, highest, total, output, extra, R, num_tokens, D, num_extra):
    """Turn logits [R,T] into weights 2^(logit - highest), and bring what was summed so far to the new highest.

    highest, total: [R]; output [R,D] and extra [R,num_extra] are sums over the weights of earlier tokens. Tokens that
    are not seen weigh 0.
    """
    for r in range(R):
        row, before = logits[r], highest[r]
        most = max(before, greatest(row, num_tokens))
        if most > before:
            factor = exp2(before - most)
            highest[r] = most
            total[r] *= factor
            for d in range(D):
                output[r, d] *= factor
            for c in range(num_extra):
                extra[r, c] *= factor
        added = np.float32(0)
        for i in range(num_tokens):
            weight = exp2(row[i] - most) if row[i] > LOWEST else np.float32(0)
            row[i] = weight
            added += weight
        total[r] += added


@inlined
def normalise(output, highest, total, probs, head, R):
    """Divide output [R,D] by the weights' sum, and turn the head's logits in probs [heads,R,S] into probabilities."""
    for r in range(R):
        share = np.float32(1) / total[r] if total[r] > 0 else np.float32(0)
        row = output[r]
        for d in range(len(row)):
            row[d] *= share
        if len(probs):
            row, most = probs[head, r], highest[r]
            for i in range(len(row)):
                row[i] = exp2(row[i] - most) * share if row[i] > LOWEST else np.float32(0)
