"""A binary heap of blocks, smallest key first, in which the key of a block can change.

`keys` [num_blocks] belongs to the blocks; `slots` [capacity] is the heap; `places` [num_blocks] is the slot of
each block in it; `count` [1] is how many it holds.
"""

from __future__ import annotations

from typing import Any

from numba.extending import register_jitable


@register_jitable
def push(keys: Any, slots: Any, places: Any, count: Any, block: int) -> None:
    """Take in a block whose key is set."""
    place = count[0]
    count[0] = place + 1
    slots[place] = block
    places[block] = place
    rise(keys, slots, places, block)


@register_jitable
def pop(keys: Any, slots: Any, places: Any, count: Any) -> int:
    """Remove and return the block with the smallest key."""
    first = slots[0]
    count[0] -= 1
    last = slots[count[0]]
    slots[0] = last
    places[last] = 0
    sink(keys, slots, places, count, last)
    return first


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
