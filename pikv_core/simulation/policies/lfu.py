"""Evict the block with the fewest accesses since it entered, among those the least recently used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numba.extending import register_jitable

from pikv_core.simulation.heap import make_heap, pop, push, remove, sink
from pikv_core.simulation.policies import REQUEST_POLICIES
from pikv_core.simulation.policies.base import RequestPolicy
from pikv_core.simulation.trace import Trace

ONE_MORE = 1 << 32  # keys are accesses * ONE_MORE + the time of the last one; traces are shorter than that


@REQUEST_POLICIES.register("lfu")
@dataclass(frozen=True)
class LFU(RequestPolicy):
    """A block that returns is counted from one again."""

    leaf_first: ClassVar[bool] = True

    def state(self, trace: Trace, capacity_blocks: int) -> tuple[Any, ...]:
        """Return the time in touches [1] and a heap by count and last touch."""
        return np.zeros(1, np.int64), *make_heap(trace.num_blocks, capacity_blocks)

    @staticmethod
    @register_jitable
    def touch(state: Any, block: int, access: int, request: int) -> None:
        now, keys, slots, places, count = state
        now[0] += 1
        keys[block] = (keys[block] // ONE_MORE + 1) * ONE_MORE + now[0]
        sink(keys, slots, places, count, block)

    @staticmethod
    @register_jitable
    def admit(state: Any, block: int, access: int, request: int) -> None:
        now, keys, slots, places, count = state
        now[0] += 1
        keys[block] = ONE_MORE + now[0]
        push(keys, slots, places, count, block)

    @staticmethod
    @register_jitable
    def evict(state: Any, incoming: int, access: int, request: int) -> int:
        _now, keys, slots, places, count = state
        return pop(keys, slots, places, count)

    @staticmethod
    @register_jitable
    def forget(state: Any, block: int) -> None:
        _now, keys, slots, places, count = state
        remove(keys, slots, places, count, block)
