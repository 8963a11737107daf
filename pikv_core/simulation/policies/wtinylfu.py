"""W-TinyLFU (arXiv 1512.00727): new blocks pass a small window; into the main part get those that are used more.

The window is an LRU, the main part a segmented LRU of probation and protection. What leaves a full window is weighed
against the main part's next victim by how often either was accessed lately; of equals the main part's stays. The
accesses are exact counts by block, halved every ten times the capacity, where the paper keeps a count-min sketch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from numba.extending import register_jitable
from pydantic import Field

from pikv_core.simulation.linked_lists import make_lists, move_to_newest, oldest, push_newest, unlink
from pikv_core.simulation.policies import REQUEST_POLICIES
from pikv_core.simulation.policies.base import RequestPolicy
from pikv_core.simulation.trace import Trace

WINDOW, PROBATION, PROTECTED = range(3)  # lists, by number
ACCESSES, WINDOW_BLOCKS, PROTECTED_BLOCKS, PERIOD_ACCESSES = range(3, 7)  # numbers; the first are the lists' lengths
HALVINGS_PER_CAPACITY = 10


@REQUEST_POLICIES.register("wtinylfu")
@dataclass(frozen=True)
class WTinyLFU(RequestPolicy):
    window_share: Annotated[float, Field(ge=0, le=1)] = 0.01  # of the capacity; at least one block
    protected_share: Annotated[float, Field(ge=0, le=1)] = 0.8  # of the main part

    def state(self, trace: Trace, capacity_blocks: int) -> tuple[Any, ...]:
        """Return the three lists, the list of each block, counts with the period they are of, and numbers."""
        window = max(1, int(self.window_share * capacity_blocks))
        protected = int(self.protected_share * (capacity_blocks - window))
        numbers = np.array([0, 0, 0, 0, window, protected, HALVINGS_PER_CAPACITY * capacity_blocks], np.int64)
        U = trace.num_blocks
        return make_lists(U, 3), np.zeros(U, np.int32), np.zeros((U, 2), np.int64), numbers

    @staticmethod
    @register_jitable
    def touch(state: Any, block: int, access: int, request: int) -> None:
        links, lists, counts, numbers = state
        _count(counts, numbers, block)
        if lists[block] != PROBATION:
            move_to_newest(links, lists.size + lists[block], block)
            return
        _move(links, lists, numbers, block, PROTECTED)
        if numbers[PROTECTED] > numbers[PROTECTED_BLOCKS]:
            _move(links, lists, numbers, oldest(links, lists.size + PROTECTED), PROBATION)

    @staticmethod
    @register_jitable
    def admit(state: Any, block: int, access: int, request: int) -> None:
        links, lists, counts, numbers = state
        _count(counts, numbers, block)
        lists[block] = WINDOW
        numbers[WINDOW] += 1
        push_newest(links, lists.size + WINDOW, block)
        if numbers[WINDOW] > numbers[WINDOW_BLOCKS]:  # there is room in the main part
            _move(links, lists, numbers, oldest(links, lists.size + WINDOW), PROBATION)

    @staticmethod
    @register_jitable
    def evict(state: Any, incoming: int, access: int, request: int) -> int:
        links, lists, counts, numbers = state
        candidate = oldest(links, lists.size + WINDOW)
        victim = candidate
        if numbers[PROBATION] + numbers[PROTECTED]:
            main = oldest(links, lists.size + (PROBATION if numbers[PROBATION] else PROTECTED))
            if _recent(counts, numbers, candidate) > _recent(counts, numbers, main):
                victim = main
                _move(links, lists, numbers, candidate, PROBATION)
        unlink(links, victim)
        numbers[lists[victim]] -= 1
        return victim

    @staticmethod
    @register_jitable
    def forget(state: Any, block: int) -> None:
        links, lists, _counts, numbers = state
        unlink(links, block)
        numbers[lists[block]] -= 1


@register_jitable
def _move(links: Any, lists: Any, numbers: Any, block: int, to: int) -> None:
    """Move a block to the new end of another list."""
    unlink(links, block)
    numbers[lists[block]] -= 1
    lists[block] = to
    numbers[to] += 1
    push_newest(links, lists.size + to, block)


@register_jitable
def _count(counts: Any, numbers: Any, block: int) -> None:
    """Count an access."""
    counts[block, 0] = _recent(counts, numbers, block) + 1
    counts[block, 1] = numbers[ACCESSES] // numbers[PERIOD_ACCESSES]
    numbers[ACCESSES] += 1


@register_jitable
def _recent(counts: Any, numbers: Any, block: int) -> int:
    """Return a block's count, halved once for each period that ended since it was written down."""
    num_halvings = numbers[ACCESSES] // numbers[PERIOD_ACCESSES] - counts[block, 1]
    return counts[block, 0] >> min(num_halvings, 62)
