"""LRU-K (O'Neil et al. 1993): evict the block whose K-th last access is longest ago; fewer than K go first, by LRU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
from numba.extending import register_jitable
from pydantic import Field

from pikv_core.simulation.heap import make_heap, pop, push, remove, sink
from pikv_core.simulation.policies import REQUEST_POLICIES
from pikv_core.simulation.policies.base import RequestPolicy
from pikv_core.simulation.trace import Trace

HAS_K = 1 << 32  # added to the keys of blocks with K accesses; traces are shorter than that


@register_jitable
def note(now: Any, history: Any, oldest: Any, keys: Any, block: int) -> None:
    """Write an access over the oldest of the block's last K, and set the key that follows from the next oldest."""
    now[0] += 1
    slot: Any = np.int64(oldest[block])
    history[block, slot] = now[0]
    slot = 0 if slot + 1 == history.shape[1] else slot + 1
    oldest[block] = slot
    keys[block] = HAS_K + history[block, slot] if history[block, slot] > 0 else now[0]


@REQUEST_POLICIES.register("lru-k")
@dataclass(frozen=True)
class LRUK(RequestPolicy):
    """Order blocks by their `k`-th last access; accesses before an eviction count too, every access by itself."""

    leaf_first: ClassVar[bool] = True
    k: Annotated[int, Field(ge=1, le=64)] = 2

    def state(self, trace: Trace, capacity_blocks: int) -> tuple[Any, ...]:
        """Return the time in touches [1], by block its last touches [U, k] and the slot of the oldest [U], and a heap.

        Touches are counted from 1; a slot of the history is 0 until it is written.
        """
        U = trace.num_blocks
        history = np.zeros((U, self.k), np.int64)
        return np.zeros(1, np.int64), history, np.zeros(U, np.uint8), *make_heap(U, capacity_blocks)

    @staticmethod
    @register_jitable
    def touch(state: Any, block: int, access: int, request: int) -> None:
        now, history, oldest, keys, slots, places, count = state
        note(now, history, oldest, keys, block)
        sink(keys, slots, places, count, block)

    @staticmethod
    @register_jitable
    def admit(state: Any, block: int, access: int, request: int) -> None:
        now, history, oldest, keys, slots, places, count = state
        note(now, history, oldest, keys, block)
        push(keys, slots, places, count, block)

    @staticmethod
    @register_jitable
    def evict(state: Any, incoming: int, access: int, request: int) -> int:
        _now, _history, _oldest, keys, slots, places, count = state
        return pop(keys, slots, places, count)

    @staticmethod
    @register_jitable
    def forget(state: Any, block: int) -> None:
        _now, _history, _oldest, keys, slots, places, count = state
        remove(keys, slots, places, count, block)
