"""S3-FIFO (Yang et al., SOSP 2023): a small queue filters what comes once, a main queue gives hits more rounds.

The variant is libCacheSim's (0.3.5), which may fill the empty cache's main queue directly; hits are equal from 20
blocks on, below which its small queue takes nothing in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from numba.extending import register_jitable
from pydantic import Field

from pikv_core.simulation.linked_lists import make_lists, oldest, pop_oldest, push_newest, unlink
from pikv_core.simulation.policies import REQUEST_POLICIES
from pikv_core.simulation.policies.base import RequestPolicy
from pikv_core.simulation.trace import Trace

NOWHERE, SMALL, MAIN, GHOST, RETURNING = range(5)
SMALL_ROOM, MAIN_ROOM, GHOST_ROOM, PROMOTION_HITS, HAS_EVICTED = range(5)
MOST_ROUNDS = 3  # in the main queue, however many hits
MOST_HITS = 255  # what a block's counter holds


@register_jitable
def enter(links: Any, where: Any, sizes: Any, block: int, kind: int) -> None:
    """Put a block at the new end of a queue."""
    push_newest(links, links.shape[0] - kind, block)
    where[block] = kind
    sizes[kind] += 1


@register_jitable
def drop_oldest(links: Any, where: Any, sizes: Any, kind: int) -> int:
    """Take the oldest block out of a queue that has one, and return it."""
    block = pop_oldest(links, links.shape[0] - kind)
    sizes[kind] -= 1
    where[block] = NOWHERE
    return block


@REQUEST_POLICIES.register("s3fifo")
@dataclass(frozen=True)
class S3FIFO(RequestPolicy):
    """Blocks enter the small queue; with `promotion_hits` hits they go on to main, else they become ghosts.

    small_share, ghost_share: of the capacity. A ghost that is accessed again enters main. Main is a queue in which
    each hit, of the last three, is another round. Before the first eviction blocks enter main where small is full.
    """

    small_share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    ghost_share: Annotated[float, Field(ge=0)] = 0.9
    promotion_hits: Annotated[int, Field(ge=1, le=MOST_HITS)] = 2

    def state(self, trace: Trace, capacity_blocks: int) -> tuple[Any, ...]:
        """Return three queues, by block its queue and hits [U], the queues' sizes [4] and the limits [5]."""
        U = trace.num_blocks
        small = max(1, int(self.small_share * capacity_blocks))
        ghost = int(self.ghost_share * capacity_blocks)
        limits = np.array([small, capacity_blocks - small, ghost, self.promotion_hits, 0], np.int64)
        return make_lists(U, 3), np.zeros(U, np.uint8), np.zeros(U, np.uint8), np.zeros(4, np.int64), limits

    @staticmethod
    @register_jitable
    def touch(state: Any, block: int, access: int, request: int) -> None:
        _links, _where, num_hits, _sizes, _limits = state
        if num_hits[block] < MOST_HITS:
            num_hits[block] += 1

    @staticmethod
    @register_jitable
    def admit(state: Any, block: int, access: int, request: int) -> None:
        links, where, num_hits, sizes, limits = state
        num_hits[block] = 0
        if where[block] == GHOST:
            unlink(links, block)
            sizes[GHOST] -= 1
            where[block] = RETURNING
        is_full = not limits[HAS_EVICTED] and sizes[SMALL] >= limits[SMALL_ROOM]
        enter(links, where, sizes, block, MAIN if is_full or where[block] == RETURNING else SMALL)

    @staticmethod
    @register_jitable
    def evict(state: Any, incoming: int, access: int, request: int) -> int:
        links, where, num_hits, sizes, limits = state
        limits[HAS_EVICTED] = 1
        if where[incoming] == GHOST:  # it must not fall out of the ghosts while room is made for it
            unlink(links, incoming)
            sizes[GHOST] -= 1
            where[incoming] = RETURNING
        if sizes[MAIN] <= limits[MAIN_ROOM]:
            while sizes[SMALL] > 0:
                block = drop_oldest(links, where, sizes, SMALL)
                if num_hits[block] < limits[PROMOTION_HITS]:
                    if limits[GHOST_ROOM] > 0:
                        if sizes[GHOST] == limits[GHOST_ROOM]:
                            drop_oldest(links, where, sizes, GHOST)
                        enter(links, where, sizes, block, GHOST)
                    return block
                num_hits[block] = 0
                enter(links, where, sizes, block, MAIN)
        block = oldest(links, links.shape[0] - MAIN)
        while num_hits[block] > 0:
            num_hits[block] = min(num_hits[block], MOST_ROUNDS) - 1
            drop_oldest(links, where, sizes, MAIN)
            enter(links, where, sizes, block, MAIN)
            block = oldest(links, links.shape[0] - MAIN)
        return drop_oldest(links, where, sizes, MAIN)

    @staticmethod
    @register_jitable
    def forget(state: Any, block: int) -> None:
        links, where, _num_hits, sizes, _limits = state
        unlink(links, block)
        sizes[where[block]] -= 1
        where[block] = NOWHERE
