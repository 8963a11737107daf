"""Evict the block whose next access is farthest (Belady 1966): the most object hits there are.

It knows the future. Its prefix hits bound no other policy's: it may keep a block whose predecessor in the
prompt is gone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numba.extending import register_jitable

from pikv_core.simulation.heap import pop, push, rise
from pikv_core.simulation.policies import REQUEST_POLICIES
from pikv_core.simulation.trace import Trace


@REQUEST_POLICIES.register("belady")
@dataclass(frozen=True)
class Belady:
    always_forward: ClassVar[bool] = True  # the future is known in the order of the trace

    def state(self, trace: Trace, capacity_blocks: int) -> tuple[Any, ...]:
        """Return the next accesses [A] and a heap by the negated next access."""
        keys = np.zeros(trace.num_blocks, np.int64)
        places = np.zeros(trace.num_blocks, np.int32)
        return trace.next_accesses, keys, np.zeros(capacity_blocks, np.int32), places, np.zeros(1, np.int64)

    @staticmethod
    @register_jitable
    def touch(state: Any, block: int, access: int) -> None:
        next_accesses, keys, slots, places, _count = state
        keys[block] = -next_accesses[access]
        rise(keys, slots, places, block)

    @staticmethod
    @register_jitable
    def admit(state: Any, block: int, access: int) -> None:
        next_accesses, keys, slots, places, count = state
        keys[block] = -next_accesses[access]
        push(keys, slots, places, count, block)

    @staticmethod
    @register_jitable
    def evict(state: Any, incoming: int, access: int) -> int:
        _next_accesses, keys, slots, places, count = state
        return pop(keys, slots, places, count)
