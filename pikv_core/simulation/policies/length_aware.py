"""Evict the least used block, among those the one farthest into its prompt (LengthAwareCache of Mooncake, FAST'25).

What the paper leaves open is settled by the hit ratios known for its conversation trace: a block's count restarts when
it comes back after an eviction. Of two blocks alike in both, the one used longer ago goes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numba.extending import register_jitable

from pikv_core.simulation.heap import make_heap, pop, push, remove, rise, sink
from pikv_core.simulation.policies import REQUEST_POLICIES
from pikv_core.simulation.policies.base import RequestPolicy
from pikv_core.simulation.trace import Trace


@REQUEST_POLICIES.register("length-aware")
@dataclass(frozen=True)
class LengthAware(RequestPolicy):
    leaf_first: ClassVar[bool] = True
    keep_counts: bool = False  # whether a block that comes back has its old count

    def state(self, trace: Trace, capacity_blocks: int) -> tuple[Any, ...]:
        """Return starts, counts, settings and a heap by count, place from the back, and access, side by side in a key.

        settings: greatest place, its bits and those of an access, the greatest count that a key can tell, keep_counts.
        """
        farthest = int(trace.blocks_per_request.max(initial=1))
        place_bits, access_bits = farthest.bit_length(), trace.ids.size.bit_length()
        most = (1 << (62 - place_bits - access_bits)) - 1
        settings = np.array([farthest, place_bits, access_bits, most, self.keep_counts], np.int64)
        counts = np.zeros(trace.num_blocks, np.int64)
        return trace.starts, counts, settings, *make_heap(trace.num_blocks, capacity_blocks)

    @staticmethod
    @register_jitable
    def touch(state: Any, block: int, access: int, request: int) -> None:
        starts, counts, settings, keys, slots, places, count = state
        counts[block] += 1
        keys[block] = _key(settings, counts[block], access - starts[request], access)
        sink(keys, slots, places, count, block)
        rise(keys, slots, places, block)  # a count too great for the key leaves the order to the place

    @staticmethod
    @register_jitable
    def admit(state: Any, block: int, access: int, request: int) -> None:
        starts, counts, settings, keys, slots, places, count = state
        counts[block] = counts[block] + 1 if settings[4] else 1
        keys[block] = _key(settings, counts[block], access - starts[request], access)
        push(keys, slots, places, count, block)

    @staticmethod
    @register_jitable
    def evict(state: Any, incoming: int, access: int, request: int) -> int:
        _starts, _counts, _settings, keys, slots, places, count = state
        return pop(keys, slots, places, count)

    @staticmethod
    @register_jitable
    def forget(state: Any, block: int) -> None:
        _starts, _counts, _settings, keys, slots, places, count = state
        remove(keys, slots, places, count, block)


@register_jitable
def _key(settings: Any, count: int, place: int, access: int) -> int:
    farthest, place_bits, access_bits, most, _keep_counts = settings
    return (((min(count, most) << place_bits) | (farthest - place)) << access_bits) | access
