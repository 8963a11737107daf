"""Drop a block some time after its last use, or after it entered; while the cache is full, the least recently used.

Providers of hosted models sell prompt caching by such a time, often five minutes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from numba.extending import register_jitable
from pydantic import Field

from pikv_core.simulation.linked_lists import make_lists, move_to_newest, oldest, pop_oldest, push_newest, unlink
from pikv_core.simulation.policies import REQUEST_POLICIES
from pikv_core.simulation.policies.base import RequestPolicy
from pikv_core.simulation.trace import Trace


@REQUEST_POLICIES.register("ttl")
@dataclass(frozen=True)
class TTL(RequestPolicy):
    expires: ClassVar[bool] = True
    ttl_s: Annotated[float, Field(ge=0)] = 300.0  # a block this old is held still, an older one is not
    since: Literal["use", "insertion"] = "use"

    def state(self, trace: Trace, capacity_blocks: int) -> tuple[Any, ...]:
        """Return blocks by use, blocks by age, the request their age is from, request times, and ttl (ms).

        Since use the two orders are one, and the second is left empty.
        """
        U = trace.num_blocks
        by_age = make_lists(U if self.since == "insertion" else 0)
        ttl_ms = np.array([1000 * self.ttl_s], np.float64)
        return make_lists(U), by_age, np.zeros(U, np.int64), trace.timestamps_ms, ttl_ms

    @staticmethod
    @register_jitable
    def touch(state: Any, block: int, access: int, request: int) -> None:
        by_use, by_age, since, _times_ms, _ttl_ms = state
        move_to_newest(by_use, by_use.shape[0] - 1, block)
        if by_age.shape[0] == 1:
            since[block] = request

    @staticmethod
    @register_jitable
    def admit(state: Any, block: int, access: int, request: int) -> None:
        by_use, by_age, since, _times_ms, _ttl_ms = state
        push_newest(by_use, by_use.shape[0] - 1, block)
        if by_age.shape[0] > 1:
            push_newest(by_age, by_age.shape[0] - 1, block)
        since[block] = request

    @staticmethod
    @register_jitable
    def evict(state: Any, incoming: int, access: int, request: int) -> int:
        by_use, by_age, _since, _times_ms, _ttl_ms = state
        victim = pop_oldest(by_use, by_use.shape[0] - 1)
        if by_age.shape[0] > 1:
            unlink(by_age, victim)
        return victim

    @staticmethod
    @register_jitable
    def expire(state: Any, request: int) -> int:
        by_use, by_age, since, times_ms, ttl_ms = state
        ages = by_age if by_age.shape[0] > 1 else by_use
        block = oldest(ages, ages.shape[0] - 1)
        if block == ages.shape[0] - 1 or times_ms[request] - times_ms[since[block]] <= ttl_ms[0]:
            return -1
        unlink(by_use, block)
        if by_age.shape[0] > 1:
            unlink(by_age, block)
        return block
