"""Evict the block whose next access is farthest (Belady 1966): the most object hits there are.

It knows the future. Its prefix hits bound no other policy's: it may keep a block whose predecessor in the
prompt is gone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from numba.extending import register_jitable

from pikv_core.simulation.heap import make_heap, pop, push, rise
from pikv_core.simulation.policies import REQUEST_POLICIES
from pikv_core.simulation.policies.base import RequestPolicy
from pikv_core.simulation.trace import Trace


@REQUEST_POLICIES.register("belady")
@dataclass(frozen=True)
class Belady(RequestPolicy):
    always_forward: ClassVar[bool] = True  # the future is known in the order of the trace
    knows_future: ClassVar[bool] = True

    def state(self, trace: Trace, capacity_blocks: int) -> tuple[Any, ...]:
        """Return the next accesses [A] and a heap by the negated next access."""
        return trace.next_accesses, *make_heap(trace.num_blocks, capacity_blocks)

    @staticmethod
    @register_jitable
    def touch(state: Any, block: int, access: int, request: int) -> None:
        next_accesses, keys, slots, places, _count = state
        keys[block] = -next_accesses[access]
        rise(keys, slots, places, block)

    @staticmethod
    @register_jitable
    def admit(state: Any, block: int, access: int, request: int) -> None:
        next_accesses, keys, slots, places, count = state
        keys[block] = -next_accesses[access]
        push(keys, slots, places, count, block)

    @staticmethod
    @register_jitable
    def evict(state: Any, incoming: int, access: int, request: int) -> int:
        _next_accesses, keys, slots, places, count = state
        return pop(keys, slots, places, count)
