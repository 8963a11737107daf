"""Adaptive replacement cache (Megiddo and Modha, FAST 2003): recency against frequency, weighed by ghosts.

Blocks accessed once (RECENT) and more often (FREQUENT) are LRU lists; each has a list of the blocks that left it.
A hit among these ghosts moves the wanted share of RECENT towards the side that dropped the block too early.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numba.extending import register_jitable

from pikv_core.simulation.linked_lists import make_lists, move_to_newest, pop_oldest, push_newest, unlink
from pikv_core.simulation.policies import REQUEST_POLICIES
from pikv_core.simulation.policies.base import RequestPolicy
from pikv_core.simulation.trace import Trace

NOWHERE, RECENT, FREQUENT, RECENT_GHOST, FREQUENT_GHOST = range(5)
CAPACITY = 0  # the slot of `sizes` that NOWHERE would have


@register_jitable
def enter(links: Any, where: Any, sizes: Any, block: int, kind: int) -> None:
    """Put a block at the new end of a list."""
    push_newest(links, links.shape[0] - kind, block)
    where[block] = kind
    sizes[kind] += 1


@register_jitable
def leave(links: Any, where: Any, sizes: Any, block: int) -> None:
    """Take a block out of the list it is in."""
    unlink(links, block)
    sizes[where[block]] -= 1
    where[block] = NOWHERE


@register_jitable
def drop_oldest(links: Any, where: Any, sizes: Any, kind: int) -> int:
    """Take the oldest block out of a list that has one, and return it."""
    block = pop_oldest(links, links.shape[0] - kind)
    sizes[kind] -= 1
    where[block] = NOWHERE
    return block


@REQUEST_POLICIES.register("arc")
@dataclass(frozen=True)
class ARC(RequestPolicy):
    """As published, the wanted size of RECENT real-valued.

    Where the published algorithm drops a ghost before a miss makes a new one, here the miss comes first and the lists
    are cut after it; the lists are the same. Hits equal those of libCacheSim (0.3.5).
    """

    def state(self, trace: Trace, capacity_blocks: int) -> tuple[Any, ...]:
        """Return four lists, the list of each block [U], capacity and list sizes [5] and the wanted RECENT size [1]."""
        sizes = np.array([capacity_blocks, 0, 0, 0, 0], np.int64)
        return make_lists(trace.num_blocks, 4), np.zeros(trace.num_blocks, np.uint8), sizes, np.zeros(1, np.float64)

    @staticmethod
    @register_jitable
    def touch(state: Any, block: int, access: int, request: int) -> None:
        links, where, sizes, _wanted = state
        if where[block] == FREQUENT:
            move_to_newest(links, links.shape[0] - FREQUENT, block)
            return
        leave(links, where, sizes, block)
        enter(links, where, sizes, block, FREQUENT)

    @staticmethod
    @register_jitable
    def admit(state: Any, block: int, access: int, request: int) -> None:
        links, where, sizes, _wanted = state
        if where[block] != NOWHERE:
            leave(links, where, sizes, block)
            enter(links, where, sizes, block, FREQUENT)
            return
        enter(links, where, sizes, block, RECENT)
        once = sizes[RECENT] + sizes[RECENT_GHOST]
        if once > sizes[CAPACITY]:
            drop_oldest(links, where, sizes, RECENT_GHOST)
        elif once + sizes[FREQUENT] + sizes[FREQUENT_GHOST] > 2 * sizes[CAPACITY]:
            drop_oldest(links, where, sizes, FREQUENT_GHOST)

    @staticmethod
    @register_jitable
    def evict(state: Any, incoming: int, access: int, request: int) -> int:
        links, where, sizes, wanted = state
        if where[incoming] == RECENT_GHOST:
            step = max(1.0, sizes[FREQUENT_GHOST] / sizes[RECENT_GHOST])
            wanted[0] = min(float(sizes[CAPACITY]), wanted[0] + step)
        elif where[incoming] == FREQUENT_GHOST:
            step = max(1.0, sizes[RECENT_GHOST] / sizes[FREQUENT_GHOST])
            wanted[0] = max(0.0, wanted[0] - step)
        is_over = sizes[RECENT] > wanted[0]
        if where[incoming] == FREQUENT_GHOST and sizes[RECENT] == wanted[0]:
            is_over = True
        if sizes[FREQUENT] == 0 or (is_over and sizes[RECENT] > 0):
            victim = drop_oldest(links, where, sizes, RECENT)
            enter(links, where, sizes, victim, RECENT_GHOST)
        else:
            victim = drop_oldest(links, where, sizes, FREQUENT)
            enter(links, where, sizes, victim, FREQUENT_GHOST)
        return victim

    @staticmethod
    @register_jitable
    def forget(state: Any, block: int) -> None:
        links, where, sizes, _wanted = state
        leave(links, where, sizes, block)
