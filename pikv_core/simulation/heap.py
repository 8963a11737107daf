"""A binary heap of blocks, smallest key first, in which the key of a block can change.

`keys` [num_blocks] belongs to the blocks; `slots` [capacity] is the heap; `places` [num_blocks] is the slot of
each block in it; `count` [2] is how many slots are in use and whether the first of them is a hole: the block that was
popped last left it, and the next one that comes takes it, without a way through the heap for either.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba.extending import register_jitable
from numpy.typing import NDArray

Heap = tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int32], NDArray[np.int64]]


def make_heap(num_blocks: int, capacity: int) -> Heap:
    """Return keys, slots, places and count of an empty heap."""
    slots, places = np.zeros(max(1, capacity), np.int32), np.zeros(num_blocks, np.int32)
    return np.zeros(num_blocks, np.int64), slots, places, np.zeros(2, np.int64)


@register_jitable
def push(keys: Any, slots: Any, places: Any, count: Any, block: int) -> None:
    """Take in a block whose key is set."""
    if count[1]:
        count[1] = 0
        slots[0] = block
        places[block] = 0
        sink(keys, slots, places, count, block)
        return
    place = count[0]
    count[0] = place + 1
    slots[place] = block
    places[block] = place
    rise(keys, slots, places, block)


@register_jitable
def pop(keys: Any, slots: Any, places: Any, count: Any) -> int:
    """Remove and return the block with the smallest key; the heap must not be empty."""
    close(keys, slots, places, count)
    count[1] = 1
    return slots[0]


@register_jitable
def first(keys: Any, slots: Any, places: Any, count: Any) -> int:
    """Return the block with the smallest key, -1 where the heap is empty."""
    close(keys, slots, places, count)
    return slots[0] if count[0] else -1


@register_jitable
def remove(keys: Any, slots: Any, places: Any, count: Any, block: int) -> None:
    """Take a block out, wherever it is."""
    close(keys, slots, places, count)
    place = places[block]
    count[0] -= 1
    last = slots[count[0]]
    if last == block:
        return
    slots[place] = last
    places[last] = place
    rise(keys, slots, places, last)
    sink(keys, slots, places, count, last)


@register_jitable
def close(keys: Any, slots: Any, places: Any, count: Any) -> None:
    """Fill the hole that a popped block left, if there is one."""
    if not count[1]:
        return
    count[1] = 0
    count[0] -= 1
    if count[0]:
        last = slots[count[0]]
        slots[0] = last
        places[last] = 0
        sink(keys, slots, places, count, last)


@register_jitable
def rise(keys: Any, slots: Any, places: Any, block: int) -> None:
    """Move a block to its place after its key fell."""
    place = places[block]
    key = keys[block]
    while place > 0:
        above = (place - 1) >> 1
        if keys[slots[above]] <= key:
            break
        slots[place] = slots[above]
        places[slots[place]] = place
        place = above
    slots[place] = block
    places[block] = place


@register_jitable
def sink(keys: Any, slots: Any, places: Any, count: Any, block: int) -> None:
    """Move a block to its place after its key grew."""
    place = places[block]
    key = keys[block]
    while True:
        below = 2 * place + 1
        if below >= count[0]:
            break
        if below + 1 < count[0] and keys[slots[below + 1]] < keys[slots[below]]:
            below += 1
        if keys[slots[below]] >= key:
            break
        slots[place] = slots[below]
        places[slots[place]] = place
        place = below
    slots[place] = block
    places[block] = place
