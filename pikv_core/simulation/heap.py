"""A binary heap of blocks, smallest key first, in which the key of a block can change.

`keys` [num_blocks] belongs to the blocks; `slots` [capacity, 2] is the heap, each block with a copy of its key, so that
a way through the heap stays within it; `places` [num_blocks] is the slot of each block in it; `count` [2] is how many
slots are in use and whether the first of them is a hole: the block that was popped last left it, and the next one that
comes takes it, without a way through the heap for either. Until then no key may change: `close` the hole first.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba.extending import register_jitable
from numpy.typing import NDArray

Heap = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.uint32], NDArray[np.int64]]

KEY, BLOCK = 0, 1


def make_heap(num_blocks: int, capacity: int) -> Heap:
    """Return keys, slots, places and count of an empty heap."""
    slots, places = np.zeros((max(1, capacity), 2), np.int64), np.zeros(num_blocks, np.uint32)
    return np.zeros(num_blocks, np.int64), slots, places, np.zeros(2, np.int64)


@register_jitable
def push(keys: Any, slots: Any, places: Any, count: Any, block: int) -> None:
    """Take in a block whose key is set."""
    if count[1]:
        count[1] = 0
        places[block] = 0
        sink(keys, slots, places, count, block)
        return
    places[block] = count[0]
    count[0] += 1
    rise(keys, slots, places, block)


@register_jitable
def pop(keys: Any, slots: Any, places: Any, count: Any) -> int:
    """Remove and return the block with the smallest key; the heap must not be empty."""
    close(keys, slots, places, count)
    count[1] = 1
    return slots[0, BLOCK]


@register_jitable
def first(keys: Any, slots: Any, places: Any, count: Any) -> int:
    """Return the block with the smallest key, -1 where the heap is empty."""
    close(keys, slots, places, count)
    return slots[0, BLOCK] if count[0] else -1


@register_jitable
def remove(keys: Any, slots: Any, places: Any, count: Any, block: int) -> None:
    """Take a block out, wherever it is."""
    close(keys, slots, places, count)
    place = places[block]
    count[0] -= 1
    last = slots[count[0], BLOCK]
    if last == block:
        return
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
        last = slots[count[0], BLOCK]
        places[last] = 0
        sink(keys, slots, places, count, last)


@register_jitable
def rise(keys: Any, slots: Any, places: Any, block: int) -> None:
    """Move a block to its place after its key fell."""
    place: Any = np.int64(places[block])
    key = keys[block]
    while place > 0:
        above = (place - 1) >> 1
        if slots[above, KEY] <= key:
            break
        move(slots, places, above, place)
        place = above
    slots[place, KEY] = key
    slots[place, BLOCK] = block
    places[block] = place


@register_jitable
def sink(keys: Any, slots: Any, places: Any, count: Any, block: int) -> None:
    """Move a block to its place after its key grew."""
    place: Any = np.int64(places[block])
    key = keys[block]
    while True:
        below = 2 * place + 1
        if below >= count[0]:
            break
        if below + 1 < count[0] and slots[below + 1, KEY] < slots[below, KEY]:
            below += 1
        if slots[below, KEY] >= key:
            break
        move(slots, places, below, place)
        place = below
    slots[place, KEY] = key
    slots[place, BLOCK] = block
    places[block] = place


@register_jitable
def move(slots: Any, places: Any, origin: int, place: int) -> None:
    """Move the block in one slot to another."""
    slots[place, KEY] = slots[origin, KEY]
    slots[place, BLOCK] = slots[origin, BLOCK]
    places[slots[origin, BLOCK]] = place
