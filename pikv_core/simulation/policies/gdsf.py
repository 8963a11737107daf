"""Greedy-Dual-Size-Frequency (Cherkasova 1998) for blocks of one size: inflation + count x cost, smallest first.

A block's cost is the work to compute it again: with attention, the later in its prompt the more. The priority of the
last victim is the inflation, which later accesses start from. The count restarts after an eviction; ties go by recency.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from numba.extending import register_jitable
from pydantic import Field

from pikv_core.simulation.heap import make_heap, pop, push, remove, rise, sink
from pikv_core.simulation.policies import REQUEST_POLICIES
from pikv_core.simulation.policies.base import RequestPolicy
from pikv_core.simulation.trace import Trace

KEY_BITS = 62
FRACTION_BITS = 16
CALLS_PER_ACCESS = 4  # at most: as a tier below others it is also told of blocks that come down


@REQUEST_POLICIES.register("gdsf")
@dataclass(frozen=True)
class GDSF(RequestPolicy):
    """attention_tokens: how far into a prompt attention is as much work as the weights; None: no attention.

    With it a block late in a prompt can outlive those before it, without which it gives no prefix hit.
    """

    attention_tokens: Annotated[float, Field(ge=1)] | None = None

    def state(self, trace: Trace, capacity_blocks: int) -> tuple[Any, ...]:
        """Return starts, costs by place, counts, numbers and a heap by priority and time, side by side in a key.

        numbers: inflation, accesses so far, the bits of time in a key, and those of an access that it cannot hold.
        No priority outgrows the greatest cost times the accesses so far: whatever an eviction adds to the inflation,
        the victim was accessed as often for it.
        """
        places = np.arange(max(1, int(trace.blocks_per_request.max(initial=0))))
        costs = 1 + (places * trace.block_tokens / self.attention_tokens if self.attention_tokens else 0.0 * places)
        most_accesses = CALLS_PER_ACCESS * trace.ids.size
        time_bits = most_accesses.bit_length()
        priority_bits = (math.ceil(costs[-1] + 1) * most_accesses).bit_length()
        fraction_bits = min(FRACTION_BITS, max(FRACTION_BITS // 2, KEY_BITS - priority_bits - time_bits))
        lost_bits = max(0, priority_bits + fraction_bits + time_bits - KEY_BITS)
        numbers = np.array([0, 0, time_bits - lost_bits, lost_bits], np.int64)
        fixed = np.rint(costs * 2**fraction_bits).astype(np.int64)
        counts = np.zeros(trace.num_blocks, np.int64)
        return trace.starts, fixed, counts, numbers, *make_heap(trace.num_blocks, capacity_blocks)

    @staticmethod
    @register_jitable
    def touch(state: Any, block: int, access: int, request: int) -> None:
        starts, costs, counts, numbers, keys, slots, places, count = state
        counts[block] += 1
        keys[block] = _key(numbers, counts[block] * costs[access - starts[request]])
        sink(keys, slots, places, count, block)
        rise(keys, slots, places, block)  # its new place in a prompt may be cheaper

    @staticmethod
    @register_jitable
    def admit(state: Any, block: int, access: int, request: int) -> None:
        starts, costs, counts, numbers, keys, slots, places, count = state
        counts[block] = 1
        keys[block] = _key(numbers, costs[access - starts[request]])
        push(keys, slots, places, count, block)

    @staticmethod
    @register_jitable
    def evict(state: Any, incoming: int, access: int, request: int) -> int:
        _starts, _costs, _counts, numbers, keys, slots, places, count = state
        victim = pop(keys, slots, places, count)
        numbers[0] = keys[victim] >> numbers[2]
        return victim

    @staticmethod
    @register_jitable
    def forget(state: Any, block: int) -> None:
        _starts, _costs, _counts, _numbers, keys, slots, places, count = state
        remove(keys, slots, places, count, block)


@register_jitable
def _key(numbers: Any, worth: int) -> int:
    """Return the key of an access now; worth: count times cost."""
    numbers[1] += 1
    inflation, now, time_bits, lost_bits = numbers
    return ((inflation + worth) << time_bits) | (now >> lost_bits)
