"""The exact prefix hits of LRU at every capacity, in one pass over the trace.

LRU is a stack algorithm (Mattson 1970): a cache of C blocks holds the top C of one recency stack. A block at
depth d when its request arrives is resident from capacity d on, and is a prefix hit from the greatest depth
among the blocks up to it. Depths come from a Fenwick tree over time slots, one live slot per block, renumbered
when slots run out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pikv_core.simulation.compiled import compiled
from pikv_core.simulation.replay import Backend, Touch
from pikv_core.simulation.trace import Trace


@dataclass(frozen=True)
class Curve:
    """Hits of LRU by capacity: entry c of each array is for a cache of c blocks, 0 to num_blocks."""

    block_hits: NDArray[np.int64]
    token_hits: NDArray[np.int64]
    block_accesses: int
    input_tokens: int
    touch: Touch


def curve(trace: Trace, touch: Touch = "reverse", backend: Backend = "numba") -> Curve:
    """Return the prefix hits at every capacity; beyond num_blocks they stay as at num_blocks."""
    longest = int(trace.blocks_per_request.max(initial=0))
    num_slots = 2 * trace.num_blocks + longest
    histogram = np.zeros((2, trace.num_blocks + 1), np.int64)
    (_compiled_depths() if backend == "numba" else _depths)(
        trace.ids,
        trace.starts,
        trace.input_tokens,
        trace.block_tokens,
        np.zeros(trace.num_blocks, np.int64),
        np.full(num_slots + 1, -1, np.int32),
        np.zeros(num_slots + 1, np.int32),
        touch == "reverse",
        histogram,
    )
    block_hits, token_hits = np.cumsum(histogram, axis=1)
    return Curve(block_hits, token_hits, trace.ids.size, int(trace.input_tokens.sum()), touch)


@cache
def _compiled_depths() -> Callable[..., None]:
    return compiled(_depths, "curve_depths")


def _depths(
    ids: Any,
    starts: Any,
    input_tokens: Any,
    block_tokens: int,
    slots: Any,
    owners: Any,
    tree: Any,
    reverse: bool,
    histogram: Any,
) -> None:
    """Count blocks (row 0) and tokens (row 1) by the capacity that makes them hits: histogram [2, U + 1].

    slots: last time slot of each of the U blocks, 0 for none. owners: block of each slot, -1 for none.
    tree: counts of live slots. Slots are numbered from 1.
    """
    num_slots = owners.size - 1
    now = 0
    num_live = 0
    for request in range(starts.size - 1):
        first, end = starts[request], starts[request + 1]
        if now + end - first > num_slots:
            now = 0
            for slot in range(1, num_slots + 1):
                owner = owners[slot]
                if owner >= 0:
                    now += 1
                    owners[slot] = -1
                    owners[now] = owner
                    slots[owner] = now
            for slot in range(1, num_slots + 1):
                low = slot & -slot
                tree[slot] = min(slot, now) - min(slot - low, now)
        depth = 0
        tokens_before = 0
        for access in range(first, end):
            slot = slots[ids[access]]
            if slot == 0:
                break
            older_or_same = 0
            while slot > 0:
                older_or_same += tree[slot]
                slot -= slot & -slot
            depth = max(depth, num_live - older_or_same + 1)
            tokens = min(block_tokens * (access - first + 1), input_tokens[request])
            histogram[0, depth] += 1
            histogram[1, depth] += tokens - tokens_before
            tokens_before = tokens
        for step in range(end - first):
            block = ids[end - 1 - step if reverse else first + step]
            slot = slots[block]
            if slot > 0:
                owners[slot] = -1
                while slot <= num_slots:
                    tree[slot] -= 1
                    slot += slot & -slot
            else:
                num_live += 1
            now += 1
            slots[block] = now
            owners[now] = block
            slot = now
            while slot <= num_slots:
                tree[slot] += 1
                slot += slot & -slot
