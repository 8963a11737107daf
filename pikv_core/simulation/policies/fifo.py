"""Evict the block that has been resident longest; a hit changes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numba.extending import register_jitable

from pikv_core.simulation.policies import REQUEST_POLICIES
from pikv_core.simulation.policies.base import RequestPolicy
from pikv_core.simulation.trace import Trace


@REQUEST_POLICIES.register("fifo")
@dataclass(frozen=True)
class FIFO(RequestPolicy):
    def state(self, trace: Trace, capacity_blocks: int) -> tuple[Any, ...]:
        """Return the queue as a ring [capacity_blocks] and the slot that is written next [1]."""
        return np.zeros(capacity_blocks, np.int32), np.zeros(1, np.int64)

    @staticmethod
    @register_jitable
    def touch(state: Any, block: int, access: int, request: int) -> None:
        pass

    @staticmethod
    @register_jitable
    def admit(state: Any, block: int, access: int, request: int) -> None:
        ring, slot = state
        here = slot[0]
        ring[here] = block
        slot[0] = 0 if here + 1 == ring.size else here + 1

    @staticmethod
    @register_jitable
    def evict(state: Any, incoming: int, access: int, request: int) -> int:
        ring, slot = state
        return ring[slot[0]]
