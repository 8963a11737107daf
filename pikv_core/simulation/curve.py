"""The exact hits of LRU at every capacity, in one pass over the trace, and what they say of a capacity."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pikv_core.errors import UsageError
from pikv_core.simulation.compiled import compiled
from pikv_core.simulation.replay import Backend, Semantics, Touch, slices
from pikv_core.simulation.stack_depths import count_object, count_prefix, make_stack
from pikv_core.simulation.trace import Trace


@dataclass(frozen=True)
class Curve:
    """Hits of LRU by capacity: entry c of each array is for a cache of c blocks, 0 to num_blocks."""

    block_hits: NDArray[np.int64]
    token_hits: NDArray[np.int64]
    block_accesses: int
    input_tokens: int
    touch: Touch
    semantics: Semantics


def curve(
    trace: Trace,
    touch: Touch = "reverse",
    semantics: Semantics = "prefix",
    backend: Backend = "numba",
    progress: Callable[[int, int], None] | None = None,
    warm_up: int = 0,
) -> Curve:
    """Return the hits at every capacity; beyond num_blocks they stay as at num_blocks.

    touch: of prefix hits; object hits are always touched forward. progress: called now and then with the requests
    done and all of them. warm_up: requests that are not counted.
    """
    longest = int(trace.blocks_per_request.max(initial=0))
    histogram = np.zeros((2, trace.num_blocks + 1), np.int64)
    stack = make_stack(trace.num_blocks, longest)
    columns = (trace.ids, trace.starts, trace.input_tokens, trace.block_tokens)
    how: Any = touch == "reverse" if semantics == "prefix" else np.zeros(max(1, longest), np.int32)
    count = _compiled_count(semantics) if backend == "numba" else _count(semantics)
    for first, last in slices(trace, warm_up):
        if first == warm_up:
            histogram[:] = 0
        count(*columns, first, last, how, stack, histogram)
        if progress is not None:
            progress(last, trace.num_requests)
    block_hits, token_hits = np.cumsum(histogram, axis=1, out=histogram)
    order: Touch = touch if semantics == "prefix" else "forward"
    accesses, tokens = int(trace.blocks_per_request[warm_up:].sum()), int(trace.input_tokens[warm_up:].sum())
    return Curve(block_hits, token_hits, accesses, tokens, order, semantics)


def worthwhile_capacity(curve: Curve, share: float = 0.9) -> int:
    """Return the least capacity, in blocks, with this share of the hits that an infinite cache has.

    share: from 0 to 1, taken as the decimal that it is written as.
    """
    if not 0 <= share <= 1:
        raise UsageError(f"share: expected a number from 0 to 1, got '{share}'", hint="0.9 is nine hits of ten")
    wanted = math.ceil(Decimal(str(share)) * int(curve.block_hits[-1]))
    return int(np.searchsorted(curve.block_hits, wanted))


def _count(semantics: Semantics) -> Callable[..., None]:
    return count_prefix if semantics == "prefix" else count_object


@cache
def _compiled_count(semantics: Semantics) -> Callable[..., None]:
    return compiled(_count(semantics), f"curve_{semantics}")
