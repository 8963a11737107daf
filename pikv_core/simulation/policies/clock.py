"""Evict in order of entry, but give a block that was hit another round for each hit (CLOCK, second chance).

A queue whose oldest block goes to its new end and loses a reference is the same as a hand on a circle.
Hits equal those of libCacheSim (0.3.5).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from numba.extending import register_jitable
from pydantic import Field

from pikv_core.simulation.linked_lists import make_lists, move_to_newest, oldest, pop_oldest, push_newest, unlink
from pikv_core.simulation.policies import REQUEST_POLICIES
from pikv_core.simulation.policies.base import RequestPolicy
from pikv_core.simulation.trace import Trace


@REQUEST_POLICIES.register("clock")
@dataclass(frozen=True)
class Clock(RequestPolicy):
    """Count a block's hits in `bits` bits; a count that is full stays, and a block enters with none."""

    bits: Annotated[int, Field(ge=1, le=8)] = 1

    def state(self, trace: Trace, capacity_blocks: int) -> tuple[Any, ...]:
        """Return the queue, the references by block [U] and the most there can be [1]."""
        most = np.full(1, 2**self.bits - 1, np.uint8)
        return make_lists(trace.num_blocks), np.zeros(trace.num_blocks, np.uint8), most

    @staticmethod
    @register_jitable
    def touch(state: Any, block: int, access: int, request: int) -> None:
        _links, references, most = state
        if references[block] < most[0]:
            references[block] += 1

    @staticmethod
    @register_jitable
    def admit(state: Any, block: int, access: int, request: int) -> None:
        links, references, _most = state
        references[block] = 0
        push_newest(links, links.shape[0] - 1, block)

    @staticmethod
    @register_jitable
    def evict(state: Any, incoming: int, access: int, request: int) -> int:
        links, references, _most = state
        queue = links.shape[0] - 1
        block = oldest(links, queue)
        while references[block] > 0:
            references[block] -= 1
            move_to_newest(links, queue, block)
            block = oldest(links, queue)
        return pop_oldest(links, queue)

    @staticmethod
    @register_jitable
    def forget(state: Any, block: int) -> None:
        links, _references, _most = state
        unlink(links, block)
