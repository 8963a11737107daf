"""Segmented LRU (Karedla 1994): blocks enter on probation, and a hit moves them to a protected segment.

Both segments are LRU lists. What the protected one has no room for goes back on probation as its newest block.
(libCacheSim's of the same name has four segments of equal size, up which a block climbs hit by hit.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
from numba.extending import register_jitable
from pydantic import Field

from pikv_core.simulation.linked_lists import make_lists, move_to_newest, oldest, pop_oldest, push_newest, unlink
from pikv_core.simulation.policies import REQUEST_POLICIES
from pikv_core.simulation.policies.base import RequestPolicy
from pikv_core.simulation.trace import Trace

COUNT, ROOM = 0, 1  # of protected blocks


@REQUEST_POLICIES.register("slru")
@dataclass(frozen=True)
class SLRU(RequestPolicy):
    """Keep up to `protected_share` of the capacity for blocks that were hit.

    The oldest block on probation goes first, the oldest protected one where there is none. Blocks on probation may
    fill the whole cache: the share is a bound of the protected ones alone.
    """

    leaf_first: ClassVar[bool] = True
    protected_share: Annotated[float, Field(ge=0, le=1)] = 0.8

    def state(self, trace: Trace, capacity_blocks: int) -> tuple[Any, ...]:
        """Return the lists (probation, protected), which blocks are protected [U], and their count and room [2]."""
        protected = np.array([0, int(self.protected_share * capacity_blocks)], np.int64)
        return make_lists(trace.num_blocks, 2), np.zeros(trace.num_blocks, np.uint8), protected

    @staticmethod
    @register_jitable
    def touch(state: Any, block: int, access: int, request: int) -> None:
        links, is_protected, protected = state
        probation_list, protected_list = links.shape[0] - 2, links.shape[0] - 1
        if is_protected[block]:
            move_to_newest(links, protected_list, block)
            return
        unlink(links, block)
        push_newest(links, protected_list, block)
        is_protected[block] = 1
        protected[COUNT] += 1
        if protected[COUNT] > protected[ROOM]:
            demoted = pop_oldest(links, protected_list)
            push_newest(links, probation_list, demoted)
            is_protected[demoted] = 0
            protected[COUNT] -= 1

    @staticmethod
    @register_jitable
    def admit(state: Any, block: int, access: int, request: int) -> None:
        links, is_protected, _protected = state
        is_protected[block] = 0
        push_newest(links, links.shape[0] - 2, block)

    @staticmethod
    @register_jitable
    def evict(state: Any, incoming: int, access: int, request: int) -> int:
        links, _is_protected, protected = state
        probation_list, protected_list = links.shape[0] - 2, links.shape[0] - 1
        if oldest(links, probation_list) != probation_list:
            return pop_oldest(links, probation_list)
        protected[COUNT] -= 1
        return pop_oldest(links, protected_list)

    @staticmethod
    @register_jitable
    def forget(state: Any, block: int) -> None:
        links, is_protected, protected = state
        unlink(links, block)
        protected[COUNT] -= is_protected[block]
