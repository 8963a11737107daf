"""The loop over requests and tiers, compiled once for every sequence of policies.

numba takes a tuple of unlike states apart by literal places alone. Each tier's functions are therefore composed with
those of the tiers below it, and get the states from their own tier on: `states[0]` is theirs, `states[1:]` the rest.
What all tiers share are arrays by tier, indexed by its level from the top.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numba.extending import register_jitable
from numpy.typing import NDArray

from pikv_core.simulation.compiled import compiled
from pikv_core.simulation.policies.base import RequestPolicy

# columns of a tally; HITS: leading blocks found there first, USED: of these, blocks not recomputed
CAPACITY, THROUGH, RESIDENT, HITS, USED, USED_TOKENS, WRITTEN, EVICTED, EXPIRED = range(9)
NUM_COLUMNS = 9

_loops: dict[tuple[Any, ...], Callable[..., None]] = {}


class Room(NamedTuple):
    """What the functions of all tiers work on: three arrays, as every further one costs time; T tiers, U blocks."""

    tally: NDArray[np.int64]  # [T, NUM_COLUMNS]
    resident: NDArray[np.uint8]  # [T, U]
    last: NDArray[np.int64]  # [U + 1, 2] access and request of each block's last use, at the end those under way


class Level(NamedTuple):
    """What can be done to a tier and those below it."""

    enter: Callable[..., None]  # (states, room, block): take in a block that is not in this tier
    note: Callable[..., None]  # (states, room, block): a block of this tier is used, or came down to it again
    touch: Callable[..., None]  # (states, room, at, block): note, in the tier at level `at`
    expire: Callable[..., None]  # (states, room)


def tier_loop(policies: Sequence[RequestPolicy], backend: Literal["numba", "python"]) -> Callable[..., None]:
    """Return the loop for these policies, top first."""
    if backend == "python":
        return _loop(_levels(policies))
    parts = tuple(part for policy in policies for part in policy.parts())
    key = tuple(policy.parts() for policy in policies)
    if key not in _loops:
        name = "__".join("_".join(part.name for part in policy.parts()) for policy in policies)
        _loops[key] = compiled(_loop(_levels(policies)), f"tiers_{name}", *parts)
    return _loops[key]


def _levels(policies: Sequence[RequestPolicy]) -> Level:
    level = len(policies) - 1
    composed = _last(policies[level], level)
    for policy in reversed(policies[:-1]):
        level -= 1
        composed = _above(policy, level, composed)
    return composed


class _Own(NamedTuple):
    """What a tier does by itself."""

    settle: Callable[..., None]  # (states, room, block): take in a block; there is room
    clear: Callable[..., int]  # (states, room, block): make room for a block where there is none; the victim or -1
    note: Callable[..., None]
    expire: Callable[..., None]


def _own(policy: RequestPolicy, level: int) -> _Own:
    """Return a tier's own functions.

    A policy is told of the block's own last use, whose place in a prompt and whose time are the block's, also where
    the block comes down at another moment; only a policy that lets blocks expire is told of the moment itself.
    """
    note_touch, admit, evict, expire = policy.functions()
    is_told_now = policy.expires

    @register_jitable
    def settle(states: Any, room: Any, block: int) -> None:
        tally, resident, last = room
        tally[level, RESIDENT] += 1
        tally[level, WRITTEN] += 1
        resident[level, block] = 1
        use = last.shape[0] - 1 if is_told_now else block
        admit(states[0], block, last[use, 0], last[use, 1])

    @register_jitable
    def clear(states: Any, room: Any, block: int) -> int:
        tally, resident, last = room
        if tally[level, RESIDENT] < tally[level, CAPACITY]:
            return -1
        now = last.shape[0] - 1
        victim = evict(states[0], block, last[now, 0], last[now, 1])
        tally[level, RESIDENT] -= 1
        tally[level, EVICTED] += 1
        resident[level, victim] = 0
        return victim

    @register_jitable
    def note(states: Any, room: Any, block: int) -> None:
        _tally, _resident, last = room
        use = last.shape[0] - 1 if is_told_now else block
        note_touch(states[0], block, last[use, 0], last[use, 1])

    @register_jitable
    def expire_own(states: Any, room: Any) -> None:
        tally, resident, last = room
        request = last[last.shape[0] - 1, 1]
        gone = expire(states[0], request)
        while gone >= 0:
            tally[level, RESIDENT] -= 1
            tally[level, EXPIRED] += 1
            resident[level, gone] = 0
            gone = expire(states[0], request)

    return _Own(settle, clear, note, expire_own)


def _last(policy: RequestPolicy, level: int) -> Level:
    """Return the functions of the last tier."""
    settle, clear, note, expire = _own(policy, level)

    @register_jitable
    def enter(states: Any, room: Any, block: int) -> None:
        clear(states, room, block)
        settle(states, room, block)

    @register_jitable
    def touch(states: Any, room: Any, at: int, block: int) -> None:
        note(states, room, block)

    return Level(enter, note, touch, expire)


def _above(policy: RequestPolicy, level: int, below: Level) -> Level:
    """Return the functions of a tier that has others below it."""
    settle, clear, note, expire_own = _own(policy, level)
    enter_below, note_below, touch_below, expire_below = below

    @register_jitable
    def enter(states: Any, room: Any, block: int) -> None:
        tally, resident, _last = room
        victim = clear(states, room, block)
        settle(states, room, block)
        down = block if tally[level, THROUGH] else victim
        if victim >= 0 and resident[level + 1, victim]:
            note_below(states[1:], room, victim)
        if down >= 0 and not resident[level + 1, down]:
            enter_below(states[1:], room, down)

    @register_jitable
    def touch(states: Any, room: Any, at: int, block: int) -> None:
        if at == level:
            note(states, room, block)
        else:
            touch_below(states[1:], room, at, block)

    @register_jitable
    def expire(states: Any, room: Any) -> None:
        expire_own(states, room)
        expire_below(states[1:], room)

    return Level(enter, note, touch, expire)


@register_jitable
def worth_using(
    sources: Any, num_found: int, tokens: int, block_tokens: int, overlap: float, work_s: Any, load: Any, is_open: Any
) -> tuple[int, float]:
    """Return how many of the found leading blocks are worth loading and the seconds that takes.

    sources [num_found]: the tier of each. work_s [2]: seconds of one token's weights, and of attention per token².
    load: seconds by tier of a request and of a block, [T] each. is_open [T]: room to note the tiers that are read.
    """
    latency_s, block_s = load
    is_open[:] = 0
    best_s = float(tokens) * (work_s[0] + work_s[1] * float(tokens))
    num_used, best_load_s, load_s = 0, 0.0, 0.0
    for place in range(num_found):
        tier = sources[place]
        if not is_open[tier]:
            is_open[tier] = 1
            load_s += latency_s[tier]
        load_s += block_s[tier]
        cached = min((place + 1) * block_tokens, tokens)
        compute_s = float(tokens - cached) * (work_s[0] + work_s[1] * float(tokens + cached))
        total_s = overlap * max(compute_s, load_s) + (1.0 - overlap) * (compute_s + load_s)
        if total_s <= best_s:
            num_used, best_load_s, best_s = place + 1, load_s, total_s
    return num_used, best_load_s


def _loop(top: Level) -> Callable[..., None]:
    """Return the loop over requests `first` to `last`, which fills in what each found and used, [R]."""
    enter, _note, touch, expire = top

    def loop(
        ids: Any,
        starts: Any,
        input_tokens: Any,
        block_tokens: int,
        first: int,
        last: int,
        reverse: bool,
        states: Any,
        room: Any,
        promotes: Any,
        overlap: float,
        work_s: Any,
        load: Any,
        scratch: Any,
        found: Any,
        used: Any,
        load_s: Any,
    ) -> None:
        tally, resident, used_last = room
        sources, is_open = scratch
        now = used_last.shape[0] - 1
        num_tiers = resident.shape[0]
        for request in range(first, last):
            begin, end = starts[request], starts[request + 1]
            used_last[now, 0], used_last[now, 1] = begin, request
            expire(states, room)
            num_found = 0
            while begin + num_found < end:
                tier = 0
                while tier < num_tiers and not resident[tier, ids[begin + num_found]]:
                    tier += 1
                if tier == num_tiers:
                    break
                sources[num_found] = tier
                tally[tier, HITS] += 1
                num_found += 1
            tokens = input_tokens[request]
            num_used, seconds = worth_using(sources, num_found, tokens, block_tokens, overlap, work_s, load, is_open)
            found[request], used[request], load_s[request] = num_found, num_used, seconds
            for place in range(num_used):
                tier = sources[place]
                tally[tier, USED] += 1
                tally[tier, USED_TOKENS] += min((place + 1) * block_tokens, tokens) - min(place * block_tokens, tokens)
            for step in range(end - begin):
                access = end - 1 - step if reverse else begin + step
                block = ids[access]
                used_last[now, 0] = access
                used_last[block, 0], used_last[block, 1] = access, request
                if resident[0, block]:
                    touch(states, room, 0, block)
                    continue
                place = access - begin
                if place < num_used and sources[place] > 0:
                    tier = sources[place]
                    if resident[tier, block]:
                        touch(states, room, tier, block)
                    if not promotes[tier]:
                        continue
                enter(states, room, block)

    return loop
