"""Tensors as the arrays that numba's kernels take, and heads spread over threads.

Shapes: B batch, G key/value heads, S stored rows (tokens or units).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from pikv_kernels.partial_attention import Partial

ALL_READ, ALL_SEEN = np.empty((0, 0), np.int64), np.empty((0, 0), np.bool_)
NO_SCALES = np.empty((0, 0), np.float32)
NO_PROBS = np.empty((0, 0, 0), np.float32)
LN2 = math.log(2)
BITS = {torch.bfloat16: torch.uint16, torch.float16: torch.int16, torch.float8_e4m3fn: torch.int8}  # see `_numbers`


def attend_heads(
    kernel: Callable[..., None],
    query: torch.Tensor,
    stored: Sequence[Any],
    read: torch.Tensor | None,
    num_stored: int,
    num_tokens: int,
    value_channels: int,
    visible: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    with_probs: bool,
) -> Partial:
    """Run a kernel of one new token, query [B,G,R,D], over what is stored, arrays [B·G,·,...] and what goes with them.

    read: int64 [B,G,K] of what is read of the first `num_stored`, or None for all of these; visible: bool [B,1|G,1,S].
    """
    B, G, R, _ = query.shape
    exact = query.detach().float().contiguous()
    rows = exact.view(B * G, R, -1).numpy()
    pages = ALL_READ if read is None else read.contiguous().view(B * G, -1).numpy()
    seen, heads_of_seen = ALL_SEEN, 1
    if visible is not None:
        seen, heads_of_seen = visible.flatten(0, 2).contiguous().numpy(), G // visible.shape[1]
    output = exact.new_empty(B, G, R, value_channels)
    limits = exact.new_empty(2, B, G, R)
    probs = exact.new_empty(B, G, R, num_tokens) if with_probs else None
    flat = NO_PROBS if probs is None else probs.view(B * G, R, num_tokens).numpy()
    out, (highest, total) = output.view(B * G, R, -1).numpy(), limits.view(2, B * G, R).numpy()
    own = (pages, num_stored, seen, heads_of_seen, float(scale), float(softcap or 0), out, highest, total, flat)
    over_heads(lambda first, end: kernel(rows, *stored, *own, first, end), B * G)
    # NaN for a query that is not finite, which kernels do not look for.
    output.add_(exact.sum(-1, keepdim=True), alpha=0.0)
    most, sums = limits.unbind(0)
    return Partial(output.to(query.dtype), sums.log2_().add_(most).mul_(LN2), probs)


def by_head(x: torch.Tensor) -> np.ndarray:
    """Return a C-contiguous view [B·G,·,...] of x [B,G,S,...], room behind the S rows included; small floats as bits.

    What does not lie like the start of a buffer [B,G,·,...] is copied.
    """
    x = x.detach()
    B, G, S = x.shape[:3]
    inner = math.prod(x.shape[3:])
    head = x.stride(1) if G > 1 else x.stride(0) if B > 1 else S * inner
    is_dense = _is_dense(x.shape[2:], x.stride()[2:]) and (1 in (B, G) or x.stride(0) == G * head)
    is_buffer = is_dense and inner > 0 and head % inner == 0 and head >= S * inner
    if is_buffer and x.storage_offset() + B * G * head <= x.untyped_storage().nbytes() // x.itemsize:
        x = x.as_strided((B * G, head // inner, *x.shape[3:]), (head, inner, *x.stride()[3:]))
    else:
        x = x.contiguous().view(B * G, *x.shape[2:])
    return x.view(BITS.get(x.dtype, x.dtype)).numpy()


def _is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    room = 1
    for count, stride in zip(reversed(shape), reversed(strides)):
        if count != 1 and stride != room:
            return False
        room *= count
    return True


def over_heads(work: Callable[[int, int], None], num_heads: int) -> None:
    """Call `work(first, end)` for all heads, a part on each of torch's threads; it must not hold Python's lock.

    These threads sleep when they wait: OpenMP's would spin beside torch's own.
    """
    threads = min(torch.get_num_threads(), num_heads)
    if threads == 1:
        work(0, num_heads)
        return
    bounds = [num_heads * part // threads for part in range(threads + 1)]
    list(_pool(threads).map(work, bounds[:-1], bounds[1:]))


@lru_cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="pikv")
