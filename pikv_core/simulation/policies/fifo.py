"""Evict the block that has been resident longest; a hit changes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numba.extending import register_jitable

from pikv_core.simulation.policies import REQUEST_POLICIES
from pikv_core.simulation.policies.base import RequestPolicy
from pikv_core.simulation.trace import Trace

READ, WRITE, STALE = range(3)


@REQUEST_POLICIES.register("fifo")
@dataclass(frozen=True)
class FIFO(RequestPolicy):
    """A block that another policy chose leaves its entry in the queue behind, stale.

    A block's stale entries are older than its own, so counting them is enough to pass over them when they come up.
    """

    def state(self, trace: Trace, capacity_blocks: int) -> tuple[Any, ...]:
        """Return the queue as a ring, stale entries by block [U], and entries read, written and stale [3].

        The ring has room for as many stale entries as for blocks, and a power of two for its size.
        """
        room = 1 << (2 * capacity_blocks - 1).bit_length()
        return np.zeros(room, np.uint32), np.zeros(trace.num_blocks, np.int32), np.zeros(3, np.int64)

    @staticmethod
    @register_jitable
    def touch(state: Any, block: int, access: int, request: int) -> None:
        pass

    @staticmethod
    @register_jitable
    def admit(state: Any, block: int, access: int, request: int) -> None:
        ring, _stale, ends = state
        ring[ends[WRITE] & (ring.size - 1)] = block
        ends[WRITE] += 1

    @staticmethod
    @register_jitable
    def evict(state: Any, incoming: int, access: int, request: int) -> int:
        ring, stale, ends = state
        block = ring[ends[READ] & (ring.size - 1)]
        ends[READ] += 1
        while ends[STALE] > 0 and stale[block] > 0:
            stale[block] -= 1
            ends[STALE] -= 1
            block = ring[ends[READ] & (ring.size - 1)]
            ends[READ] += 1
        return block

    @staticmethod
    @register_jitable
    def forget(state: Any, block: int) -> None:
        ring, stale, ends = state
        stale[block] += 1
        ends[STALE] += 1
        if ends[WRITE] - ends[READ] < ring.size:
            return
        kept = ends[READ]
        for entry in range(ends[READ], ends[WRITE]):
            held = ring[entry & (ring.size - 1)]
            if stale[held] > 0:
                stale[held] -= 1
            else:
                ring[kept & (ring.size - 1)] = held
                kept += 1
        ends[WRITE] = kept
        ends[STALE] = 0
