"""SIEVE (Zhang et al., NSDI 2024): a queue in order of entry and a hand that spares the blocks hit since it passed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numba.extending import register_jitable

from pikv_core.simulation.linked_lists import NEWER, make_lists, oldest, push_newest, unlink
from pikv_core.simulation.policies import REQUEST_POLICIES
from pikv_core.simulation.policies.base import RequestPolicy
from pikv_core.simulation.trace import Trace


@REQUEST_POLICIES.register("sieve")
@dataclass(frozen=True)
class Sieve(RequestPolicy):
    """The hand goes from the oldest block to the newest and then starts over; what it spares stays in its place.

    Hits equal those of libCacheSim (0.3.5).
    """

    def state(self, trace: Trace, capacity_blocks: int) -> tuple[Any, ...]:
        """Return the queue, hits by entry [U + 1] and the hand [1]: a block, or the queue's own entry to start."""
        U = trace.num_blocks
        return make_lists(U), np.zeros(U + 1, np.uint8), np.full(1, U, np.uint32)

    @staticmethod
    @register_jitable
    def touch(state: Any, block: int, access: int, request: int) -> None:
        _links, was_hit, _hand = state
        was_hit[block] = 1

    @staticmethod
    @register_jitable
    def admit(state: Any, block: int, access: int, request: int) -> None:
        links, was_hit, _hand = state
        was_hit[block] = 0
        push_newest(links, links.shape[0] - 1, block)

    @staticmethod
    @register_jitable
    def evict(state: Any, incoming: int, access: int, request: int) -> int:
        links, was_hit, hand = state
        queue = links.shape[0] - 1
        block = oldest(links, queue) if hand[0] == queue else hand[0]
        was_hit[queue] = 1  # so that the hand goes on over the queue's own entry, which it meets once at most
        while was_hit[block]:
            was_hit[block] = 0
            block = links[block, NEWER]
        hand[0] = links[block, NEWER]
        unlink(links, block)
        return block

    @staticmethod
    @register_jitable
    def forget(state: Any, block: int) -> None:
        links, _was_hit, hand = state
        if hand[0] == block:
            hand[0] = links[block, NEWER]
        unlink(links, block)
