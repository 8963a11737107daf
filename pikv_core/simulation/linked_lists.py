"""Doubly linked lists of blocks in one array: constant-time moves for recency and insertion orders.

`links` is [num_blocks + num_lists, 2]: the older and the newer neighbour of each block. List i is a ring through its
own entry `num_blocks + i`, and a block is in at most one list.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba.extending import register_jitable
from numpy.typing import NDArray

OLDER, NEWER = 0, 1


def make_lists(num_blocks: int, num_lists: int = 1) -> NDArray[np.uint32]:
    """Return `num_lists` empty lists over `num_blocks` blocks."""
    links = np.zeros((num_blocks + num_lists, 2), np.uint32)
    links[num_blocks:] = np.arange(num_blocks, num_blocks + num_lists)[:, None]
    return links


@register_jitable
def push_newest(links: Any, ring: int, block: int) -> None:
    """Put a block at the new end of the list whose own entry is `ring`."""
    newest = links[ring, OLDER]
    links[block, OLDER] = newest
    links[block, NEWER] = ring
    links[newest, NEWER] = block
    links[ring, OLDER] = block


@register_jitable
def unlink(links: Any, block: int) -> None:
    """Take a block out of its list."""
    older, newer = links[block, OLDER], links[block, NEWER]
    links[older, NEWER] = newer
    links[newer, OLDER] = older


@register_jitable
def oldest(links: Any, ring: int) -> int:
    """Return the block at the old end, or `ring` where the list is empty."""
    return links[ring, NEWER]


@register_jitable
def move_to_newest(links: Any, ring: int, block: int) -> None:
    """Move a block to the new end of the list it is in."""
    older, newer = links[block, OLDER], links[block, NEWER]
    if newer == ring:
        return
    links[older, NEWER] = newer
    links[newer, OLDER] = older
    push_newest(links, ring, block)


@register_jitable
def pop_oldest(links: Any, ring: int) -> int:
    """Take the block at the old end out of a list that is not empty, and return it."""
    block = links[ring, NEWER]
    newer = links[block, NEWER]
    links[ring, NEWER] = newer
    links[newer, OLDER] = ring
    return block
