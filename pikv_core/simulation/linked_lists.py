"""Doubly linked lists of blocks in one array: constant-time moves for recency and insertion orders.

`links` is [2, num_blocks + num_lists]: row 0 the older neighbour, row 1 the newer one. List i is a ring
through its own entry `num_blocks + i`, and a block is in at most one list.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba.extending import register_jitable
from numpy.typing import NDArray

OLDER, NEWER = 0, 1


def make_lists(num_blocks: int, num_lists: int = 1) -> NDArray[np.int32]:
    """Return `num_lists` empty lists over `num_blocks` blocks."""
    links = np.zeros((2, num_blocks + num_lists), np.int32)
    links[:, num_blocks:] = np.arange(num_blocks, num_blocks + num_lists)
    return links


@register_jitable
def push_newest(links: Any, ring: int, block: int) -> None:
    """Put a block at the new end of the list whose own entry is `ring`."""
    newest = links[OLDER, ring]
    links[OLDER, block] = newest
    links[NEWER, block] = ring
    links[NEWER, newest] = block
    links[OLDER, ring] = block


@register_jitable
def unlink(links: Any, block: int) -> None:
    """Take a block out of its list."""
    older, newer = links[OLDER, block], links[NEWER, block]
    links[NEWER, older] = newer
    links[OLDER, newer] = older


@register_jitable
def oldest(links: Any, ring: int) -> int:
    """Return the block at the old end, or `ring` where the list is empty."""
    return links[NEWER, ring]
