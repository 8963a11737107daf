"""Random requests, and a replay over plain lists that asks a policy written in plain Python for its victims."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from pikv_core.simulation.policies.base import RequestPolicy
from pikv_core.simulation.replay import replay
from pikv_core.simulation.trace import Trace, make_trace

CAPACITIES = (1, 2, 5, 8, 1000)
ORDERS = (("prefix", "reverse"), ("prefix", "forward"), ("object", "forward"))


@dataclass(frozen=True)
class Log:
    """Requests with the time (ms), category and turn of each."""

    requests: list[list[int]]
    times_ms: list[float]
    categories: list[str]
    turns: list[int]

    def trace(self, block_tokens: int = 4) -> Trace:
        trace = make_trace(self.requests, block_tokens, None, self.times_ms, self.categories)
        return dataclasses.replace(trace, turn=np.array(self.turns, np.int32))


def random_log(seed: int, num_requests: int = 30, mean_gap_ms: float = 1000.0) -> Log:
    """Return requests, of even seeds chained by prefix, of odd ones in any order and with repetitions."""
    random_ = random.Random(seed)
    paths = [[random_.randrange(3) for _ in range(random_.randrange(6))] for _ in range(num_requests)] + [[0]]
    if seed % 2:
        requests = [[7 + 2 * block + (random_.random() < 0.3) for block in path] for path in paths]
    else:
        ids: dict[tuple[int, ...], int] = {}
        requests = [[ids.setdefault(tuple(path[: end + 1]), len(ids)) for end in range(len(path))] for path in paths]
    gaps = [random_.choice([0.0, 0.0, float(random_.randrange(1, 4)) * mean_gap_ms]) for _ in requests]
    categories = [random_.choice("ab") for _ in requests]
    turns = [random_.randrange(3) for _ in requests]
    return Log(requests, list(itertools.accumulate(gaps)), categories, turns)


def plain_replay(
    log: Log, policy: Any, capacity: int, semantics: str, touch: str, after: Callable[[set[int]], None] | None = None
) -> tuple[list[int], int, int]:
    """Return hits per request, evictions and expirations.

    policy: touch, admit and evict (block, place, request), the last returning the victim, and perhaps expire (request),
    returning all blocks whose time is over. after: is shown the resident blocks after each request.
    """
    cache: set[int] = set()
    hits, evictions, expirations = [], 0, 0
    for request, blocks in enumerate(log.requests):
        if hasattr(policy, "expire"):
            gone = policy.expire(request)
            assert set(gone) <= cache
            cache -= set(gone)
            expirations += len(gone)
        num_hits = len(list(itertools.takewhile(cache.__contains__, blocks))) if semantics == "prefix" else 0
        places = range(len(blocks))
        for place in reversed(places) if touch == "reverse" else places:
            block = blocks[place]
            if block in cache:
                num_hits += semantics == "object"
                policy.touch(block, place, request)
                continue
            if len(cache) == capacity:
                cache.remove(policy.evict(block, place, request))
                evictions += 1
            cache.add(block)
            policy.admit(block, place, request)
        if after is not None:
            after(cache)
        hits.append(num_hits)
    return hits, evictions, expirations


def check(policy: RequestPolicy, plain: Callable[[Log, int], Any], seeds: int = 30, **shape: Any) -> None:
    """Assert that the compiled replay and its twin equal the plain one, at every order and capacity."""
    for seed in range(seeds):
        log = random_log(seed, **shape)
        trace = log.trace()
        for capacity, (semantics, touch) in itertools.product(CAPACITIES, ORDERS):
            expected = plain_replay(log, plain(log, capacity), capacity, semantics, touch)
            for backend in ("numba", "python"):
                found = replay(trace, policy, capacity, semantics, touch, backend)
                counted = found.hits.tolist(), found.evictions, found.expirations
                assert counted == expected, f"seed {seed}, capacity {capacity}, {semantics}, {touch}, {backend}"
