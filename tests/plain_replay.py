"""Replay requests over a cache of plain Python lists: the reference that block policies are compared with."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Protocol

from pikv_core.simulation.policies.base import RequestPolicy
from pikv_core.simulation.replay import Semantics, Touch, replay
from pikv_core.simulation.trace import make_trace

WAYS: list[tuple[Semantics, Touch]] = [("prefix", "reverse"), ("prefix", "forward"), ("object", "forward")]


class PlainCache(Protocol):
    """A policy written down plainly, with data structures of its own."""

    def __contains__(self, block: int) -> bool: ...

    def hit(self, block: int) -> None: ...

    def miss(self, block: int) -> bool:
        """Take the block in; tell whether another had to leave."""
        ...


def plain_replay(
    requests: list[list[int]], cache: PlainCache, semantics: Semantics, touch: Touch
) -> tuple[list[int], int]:
    """Return hits per request and the number of evictions."""
    hits, evictions = [], 0
    for request in requests:
        num_hits = len(list(itertools.takewhile(lambda block: block in cache, request))) if semantics == "prefix" else 0
        for block in reversed(request) if touch == "reverse" else request:
            if block in cache:
                num_hits += semantics == "object"
                cache.hit(block)
            else:
                evictions += cache.miss(block)
        hits.append(num_hits)
    return hits, evictions


def random_requests(seed: int) -> list[list[int]]:
    """Return requests that share prefixes, of ids that name their prefix (even seeds) or repeat within a prompt."""
    random_ = random.Random(seed)
    paths: list[list[int]] = [[0]]
    for _ in range(random_.randrange(10, 60)):
        shared = random_.choice(paths)
        own = [random_.randrange(4) for _ in range(random_.randrange(0, 5))]
        paths.append((shared[: random_.randrange(0, len(shared) + 1)] + own)[:9])
    if seed % 2:
        return [[5 * block + place // 3 for place, block in enumerate(path)] for path in paths]
    ids: dict[tuple[int, ...], int] = {}
    return [[ids.setdefault(tuple(path[: end + 1]), len(ids)) for end in range(len(path))] for path in paths]


def assert_replay_equals_plain(policy: RequestPolicy, plain: Callable[[int], PlainCache], num_seeds: int = 30) -> None:
    """Compare hits per request and evictions of the uncompiled policy; plain: makes the cache from its capacity."""
    for seed in range(num_seeds):
        requests = random_requests(seed)
        trace = make_trace(requests)
        for capacity, (semantics, touch) in itertools.product((1, 2, 3, 5, 8, 13, 20, 1000), WAYS):
            found = replay(trace, policy, capacity, semantics, touch, backend="python")
            expected = plain_replay(requests, plain(min(capacity, trace.num_blocks)), semantics, touch)
            where = f"seed {seed}, capacity {capacity}, {semantics}, {touch}"
            assert (found.hits.tolist(), found.evictions) == expected, where
