"""Evict the leaf whose next access is farthest: Belady's choice among blocks that no resident block builds on.

It knows the future, and is a heuristic: what it keeps can be used, as Belady's often cannot, but no proof makes it the
best of the policies that evict leaves. A block builds on the one before it where it is first seen in the trace; that
makes a forest even of requests that repeat a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numba.extending import register_jitable
from numpy.typing import NDArray

from pikv_core.simulation.heap import close, make_heap, pop, push, remove, rise
from pikv_core.simulation.policies import REQUEST_POLICIES
from pikv_core.simulation.policies.base import RequestPolicy
from pikv_core.simulation.trace import ROOT, Trace


@REQUEST_POLICIES.register("belady-leaf")
@dataclass(frozen=True)
class BeladyLeaf(RequestPolicy):
    leaf_first: ClassVar[bool] = True
    knows_future: ClassVar[bool] = True

    def state(self, trace: Trace, capacity_blocks: int) -> tuple[Any, ...]:
        """Return next accesses [A], parents, resident children, residents, and a heap of leaves by next access."""
        U = trace.num_blocks
        heap = make_heap(U, capacity_blocks)
        return trace.next_accesses, parents(trace), np.zeros(U, np.int32), np.zeros(U, np.uint8), *heap

    @staticmethod
    @register_jitable
    def touch(state: Any, block: int, access: int, request: int) -> None:
        next_accesses, _parents, children, _residents, keys, slots, places, _count = state
        _note(next_accesses, keys, block, access)
        if not children[block]:
            rise(keys, slots, places, block)

    @staticmethod
    @register_jitable
    def admit(state: Any, block: int, access: int, request: int) -> None:
        next_accesses, parents_, children, residents, keys, slots, places, count = state
        _note(next_accesses, keys, block, access)
        residents[block] = 1
        if not children[block]:
            push(keys, slots, places, count, block)
        parent = parents_[block]
        if parent >= 0:
            children[parent] += 1
            if children[parent] == 1 and residents[parent]:
                remove(keys, slots, places, count, parent)

    @staticmethod
    @register_jitable
    def evict(state: Any, incoming: int, access: int, request: int) -> int:
        _next_accesses, parents_, children, residents, keys, slots, places, count = state
        victim = pop(keys, slots, places, count)
        residents[victim] = 0
        parent = parents_[victim]
        if parent >= 0:
            children[parent] -= 1
            if not children[parent] and residents[parent]:
                push(keys, slots, places, count, parent)
        close(keys, slots, places, count)  # the block that comes may be no leaf
        return victim


@register_jitable
def _note(next_accesses: Any, keys: Any, block: int, access: int) -> None:
    """Make the negated next access a block's key; of blocks without one those with the oldest access go first."""
    end = next_accesses.size
    following = next_accesses[access] if next_accesses[access] < end else 2 * end - access
    # touched in reverse, the first of two accesses of a request comes after the second, whose key stays
    keys[block] = min(keys[block], -following)


def parents(trace: Trace) -> NDArray[np.int32]:
    """Return the block before each one where it is first seen, ROOT for the first of a prompt. [num_blocks]"""
    before = np.roll(trace.ids, 1)
    before[trace.starts[:-1][trace.blocks_per_request > 0]] = ROOT
    first = np.zeros(trace.num_blocks, np.int32)
    first[trace.ids[::-1]] = before[::-1]  # of a block's accesses the first is written last
    return first
