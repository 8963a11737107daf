"""The loop over requests and tiers, compiled once for every sequence of policies.

numba takes a tuple of unlike states apart by literal places alone. Each tier's functions are therefore composed with
those of the tiers below it, and get the states from their own tier on: `states[0]` is theirs, `states[1:]` the rest.
What all tiers share are arrays by tier, indexed by its level from the top.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

from numba.extending import register_jitable

from pikv_core.simulation.compiled import compiled
from pikv_core.simulation.policies.base import Functions, RequestPolicy

# counters by tier; HITS: leading blocks found there first, USED: of these, blocks not recomputed
RESIDENT, HITS, USED, USED_TOKENS, WRITTEN, EVICTED, EXPIRED = range(7)
NUM_COUNTERS = 7

_loops: dict[tuple[Any, ...], Callable[..., None]] = {}


class Level(NamedTuple):
    """What can be done to a tier and those below it."""

    enter: Callable[..., None]  # (states, room, block, access, request): take in a block that is not in this tier
    touch: Callable[..., None]  # (states, level, block, access, request): a block of the tier at `level` is used
    expire: Callable[..., None]  # (states, room, request)


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
    composed = _last(policies[level].functions(), level)
    for policy in reversed(policies[:-1]):
        level -= 1
        composed = _above(policy.functions(), level, composed)
    return composed


def _last(functions: Functions, level: int) -> Level:
    note_touch, admit, evict, expire = functions

    @register_jitable
    def enter_last(states: Any, room: Any, block: int, access: int, request: int) -> None:
        capacities, _through, resident, counters = room
        if counters[level, RESIDENT] == capacities[level]:
            victim = evict(states[0], block, access, request)
            resident[level, victim] = 0
            counters[level, EVICTED] += 1
        else:
            counters[level, RESIDENT] += 1
        resident[level, block] = 1
        counters[level, WRITTEN] += 1
        admit(states[0], block, access, request)

    @register_jitable
    def touch_last(states: Any, at: int, block: int, access: int, request: int) -> None:
        note_touch(states[0], block, access, request)

    @register_jitable
    def expire_last(states: Any, room: Any, request: int) -> None:
        _capacities, _through, resident, counters = room
        gone = expire(states[0], request)
        while gone >= 0:
            resident[level, gone] = 0
            counters[level, RESIDENT] -= 1
            counters[level, EXPIRED] += 1
            gone = expire(states[0], request)

    return Level(enter_last, touch_last, expire_last)


def _above(functions: Functions, level: int, below: Level) -> Level:
    _note_touch, _admit, evict, _expire = functions
    enter_alone, touch_alone, expire_alone = _last(functions, level)
    enter_below, touch_below, expire_below = below

    @register_jitable
    def enter(states: Any, room: Any, block: int, access: int, request: int) -> None:
        capacities, through, resident, counters = room
        if counters[level, RESIDENT] == capacities[level]:
            victim = evict(states[0], block, access, request)
            resident[level, victim] = 0
            counters[level, RESIDENT] -= 1
            counters[level, EVICTED] += 1
            if resident[level + 1, victim]:
                touch_below(states[1:], level + 1, victim, access, request)
            elif not through[level]:
                enter_below(states[1:], room, victim, access, request)
        enter_alone(states, room, block, access, request)
        if through[level] and not resident[level + 1, block]:
            enter_below(states[1:], room, block, access, request)

    @register_jitable
    def touch(states: Any, at: int, block: int, access: int, request: int) -> None:
        if at == level:
            touch_alone(states, at, block, access, request)
        else:
            touch_below(states[1:], at, block, access, request)

    @register_jitable
    def expire_all(states: Any, room: Any, request: int) -> None:
        expire_alone(states, room, request)
        expire_below(states[1:], room, request)

    return Level(enter, touch, expire_all)


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
    enter, touch, expire_all = top

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
        _capacities, _through, resident, counters = room
        sources, is_open = scratch
        num_tiers = resident.shape[0]
        for request in range(first, last):
            begin, end = starts[request], starts[request + 1]
            expire_all(states, room, request)
            num_found = 0
            while begin + num_found < end:
                tier = 0
                while tier < num_tiers and not resident[tier, ids[begin + num_found]]:
                    tier += 1
                if tier == num_tiers:
                    break
                sources[num_found] = tier
                counters[tier, HITS] += 1
                num_found += 1
            tokens = input_tokens[request]
            num_used, seconds = worth_using(sources, num_found, tokens, block_tokens, overlap, work_s, load, is_open)
            found[request], used[request], load_s[request] = num_found, num_used, seconds
            for place in range(num_used):
                tier = sources[place]
                counters[tier, USED] += 1
                counters[tier, USED_TOKENS] += min((place + 1) * block_tokens, tokens) - min(
                    place * block_tokens, tokens
                )
            for step in range(end - begin):
                access = end - 1 - step if reverse else begin + step
                block = ids[access]
                if resident[0, block]:
                    touch(states, 0, block, access, request)
                    continue
                place = access - begin
                if place < num_used and sources[place] > 0:
                    tier = sources[place]
                    if resident[tier, block]:
                        touch(states, tier, block, access, request)
                    if not promotes[tier]:
                        continue
                enter(states, room, block, access, request)

    return loop
