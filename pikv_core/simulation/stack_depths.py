"""Count blocks and tokens by the least LRU cache that hits them: exact stack depths, in one pass.

LRU is a stack algorithm (Mattson 1970): a cache of c blocks holds the top c of one recency stack. The stack lies in
time slots: a block holds the slot of its last touch, and its depth is the number of held slots from there on. Held
slots are counted by chunks of 64 in a Fenwick tree. Blocks that were last touched one after the other hold
neighbouring slots, so inside such a run each depth follows from the one before and nothing has to be counted.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba.extending import register_jitable
from numpy.typing import NDArray

NOW, HELD, SETTLED = range(3)  # the entries of a stack's clock: last slot given, slots held, last slot in the tree
CHUNK_BITS = 6


class Stack(NamedTuple):
    """A recency stack; slots count from 1 and are numbered anew when they run out."""

    slots: NDArray[np.int32]  # [U] of each block, 0 for none
    blocks: NDArray[np.int32]  # [slots + 1] that holds each slot, -1 for none
    tree: NDArray[np.int32]  # [chunks + 1] Fenwick tree of the slots held in each chunk
    clock: NDArray[np.int64]  # [3]


def make_stack(num_blocks: int, longest_request: int) -> Stack:
    """Return an empty stack whose slots last for twice the blocks and one request."""
    num_slots = 2 * num_blocks + longest_request
    return Stack(
        np.zeros(num_blocks, np.int32),
        np.full(num_slots + 1, -1, np.int32),
        np.zeros((num_slots >> CHUNK_BITS) + 2, np.int32),
        np.zeros(SETTLED + 1, np.int64),
    )


def count_prefix(
    ids: Any,
    starts: Any,
    input_tokens: Any,
    block_tokens: int,
    first: int,
    last: int,
    reverse: bool,
    stack: Any,
    histogram: Any,
) -> None:
    """Count prefix hits of requests `first` to `last`; histogram [2, U + 1]: blocks, tokens by capacity.

    A block is a prefix hit from the greatest depth among the blocks up to it, all as the request arrives.
    """
    slots, blocks, tree, clock = stack
    for request in range(first, last):
        begin, end = starts[request], starts[request + 1]
        make_room(slots, blocks, tree, clock, end - begin)
        depth = 0
        capacity = 0
        tokens_before = 0
        slot_before = -1
        for access in range(begin, end):
            slot = slots[ids[access]]
            if slot == 0:
                break
            if slot == slot_before - 1:
                depth += 1
            elif slot == slot_before + 1:
                depth -= 1
            elif slot != slot_before:
                depth = depth_of(blocks, tree, clock, slot)
            slot_before = slot
            capacity = max(capacity, depth)
            tokens = min(block_tokens * (access - begin + 1), input_tokens[request])
            histogram[0, capacity] += 1
            histogram[1, capacity] += tokens - tokens_before
            tokens_before = tokens
        leaving, num_leaving = 0, 0
        for step in range(end - begin):
            block = ids[end - 1 - step if reverse else begin + step]
            slot = slots[block]
            if slot > 0:
                if slot >> CHUNK_BITS != leaving:
                    add(tree, leaving, -num_leaving)
                    leaving, num_leaving = slot >> CHUNK_BITS, 0
                num_leaving += 1
            move_to_top(slots, blocks, clock, block)
        add(tree, leaving, -num_leaving)
        settle(tree, clock)


def count_object(
    ids: Any,
    starts: Any,
    input_tokens: Any,
    block_tokens: int,
    first: int,
    last: int,
    depths: Any,
    stack: Any,
    histogram: Any,
) -> None:
    """Count object hits of requests `first` to `last`; histogram [2, U + 1]: blocks, tokens by capacity.

    depths: room for those of the longest request.
    """
    slots, blocks, tree, clock = stack
    depth = 0
    slot_before = -1
    leaving, num_leaving = 0, 0
    for request in range(first, last):
        begin, end = starts[request], starts[request + 1]
        if make_room(slots, blocks, tree, clock, end - begin):
            leaving, num_leaving, slot_before = 0, 0, -1
        num_seen = 0
        for access in range(begin, end):
            block = ids[access]
            slot = slots[block]
            if slot > 0:
                if slot != slot_before + 1:  # else the block before went from just below it to the top: the same depth
                    add(tree, leaving, -num_leaving)
                    settle(tree, clock)
                    leaving, num_leaving = slot >> CHUNK_BITS, 0
                    depth = depth_of(blocks, tree, clock, slot)
                elif slot >> CHUNK_BITS != leaving:
                    add(tree, leaving, -num_leaving)
                    leaving, num_leaving = slot >> CHUNK_BITS, 0
                num_leaving += 1
                depths[num_seen] = depth
                num_seen += 1
                histogram[0, depth] += 1
            slot_before = slot if slot > 0 else -1
            move_to_top(slots, blocks, clock, block)
        count_tokens(depths, num_seen, block_tokens, input_tokens[request], histogram)
    add(tree, leaving, -num_leaving)
    settle(tree, clock)


@register_jitable
def count_tokens(depths: Any, count: int, block_tokens: int, input_tokens: int, histogram: Any) -> None:
    """Count one request's tokens: h hits are worth min(block_tokens × h, input_tokens), whichever they are."""
    if block_tokens * (count - 1) > input_tokens:
        sort(depths, count)
        for place in range(count):
            worth = min(block_tokens * (place + 1), input_tokens) - min(block_tokens * place, input_tokens)
            histogram[1, depths[place]] += worth
        return
    deepest = 0
    for place in range(count):
        histogram[1, depths[place]] += block_tokens
        deepest = max(deepest, depths[place])
    histogram[1, deepest] -= max(0, block_tokens * count - input_tokens)


@register_jitable
def sort(values: Any, count: int) -> None:
    """Sort the first values in place (Shell 1959)."""
    gap = count
    while gap > 1:
        gap = max(1, 5 * gap // 11)
        for place in range(gap, count):
            value = values[place]
            hole = place
            while hole >= gap and values[hole - gap] > value:
                values[hole] = values[hole - gap]
                hole -= gap
            values[hole] = value


@register_jitable
def depth_of(blocks: Any, tree: Any, clock: Any, slot: int) -> int:
    """Return the depth, 1 for the top, of the block that holds a slot; the tree must be settled."""
    chunk = slot >> CHUNK_BITS
    same_or_older = 0
    for other in range(chunk << CHUNK_BITS, slot + 1):
        same_or_older += blocks[other] >= 0
    while chunk > 0:
        same_or_older += tree[chunk]
        chunk -= chunk & -chunk
    return clock[HELD] - same_or_older + 1


@register_jitable
def move_to_top(slots: Any, blocks: Any, clock: Any, block: int) -> None:
    """Give a block the next slot; the caller takes its old one out of the tree, settle counts the new one."""
    slot = slots[block]
    if slot > 0:
        blocks[slot] = -1
    else:
        clock[HELD] += 1
    clock[NOW] += 1
    slots[block] = clock[NOW]
    blocks[clock[NOW]] = block


@register_jitable
def settle(tree: Any, clock: Any) -> None:
    """Count the slots given since the last time; those of them given up again are subtracted on their own."""
    while clock[SETTLED] < clock[NOW]:
        next_slot = clock[SETTLED] + 1
        chunk = next_slot >> CHUNK_BITS
        end = min(clock[NOW], (chunk << CHUNK_BITS) + (1 << CHUNK_BITS) - 1)
        add(tree, chunk, end - clock[SETTLED])
        clock[SETTLED] = end


@register_jitable
def add(tree: Any, chunk: int, count: int) -> None:
    """Add to the slots held in a chunk."""
    place = chunk + 1
    while place < tree.size:
        tree[place] += count
        place += place & -place


@register_jitable
def make_room(slots: Any, blocks: Any, tree: Any, clock: Any, wanted: int) -> bool:
    """Number the held slots from 1 on, and count them anew, where fewer than `wanted` are left; tell whether."""
    if clock[NOW] + wanted < blocks.size:
        return False
    now = 0
    for slot in range(1, blocks.size):
        block = blocks[slot]
        if block >= 0:
            now += 1
            blocks[slot] = -1
            blocks[now] = block
            slots[block] = now
    tree[:] = 0
    clock[NOW] = now
    clock[SETTLED] = 0
    settle(tree, clock)
    return True
