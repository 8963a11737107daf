"""Replays equal simulators of plain lists, and Belady's choice is the best of all choices."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from pikv_core.simulation.metrics import token_hit_ratio
from pikv_core.simulation.policies import REQUEST_POLICIES
from pikv_core.simulation.replay import replay
from pikv_core.simulation.trace import make_trace


def random_requests(seed: int, chained: bool) -> list[list[int]]:
    """Return requests whose ids name their whole prefix (chained), or ids in any order with repetitions."""
    random_ = random.Random(seed)
    paths = [
        tuple(random_.randrange(3) for _ in range(random_.randrange(0, 6))) for _ in range(random_.randrange(2, 30))
    ] + [(0,)]
    if not chained:
        return [[7 + 5 * block for block in path] for path in paths]
    ids: dict[tuple[int, ...], int] = {}
    return [[ids.setdefault(path[: end + 1], len(ids)) for end in range(len(path))] for path in paths]


def brute_force(
    requests: list[list[int]], policy: str, capacity: int, semantics: str, touch: str
) -> tuple[list[int], int]:
    """Return hits per request and the number of evictions; `cache` holds the next victim first."""
    flat = [block for request in requests for block in request]
    cache: list[int] = []
    hits, evictions, start = [], 0, 0
    for request in requests:
        run = list(itertools.takewhile(lambda block: block in cache, request))
        num_hits = len(run) if semantics == "prefix" else 0
        order = list(range(len(request)))
        for offset in reversed(order) if touch == "reverse" else order:
            block = request[offset]
            if block in cache:
                num_hits += semantics == "object"
                if policy == "lru":
                    cache.remove(block)
                    cache.append(block)
                continue
            if len(cache) == capacity:
                if policy == "belady":
                    rest = flat[start + offset + 1 :]
                    far = max(cache, key=lambda held: rest.index(held) if held in rest else len(flat))
                    cache.remove(far)
                else:
                    cache.pop(0)
                evictions += 1
            cache.append(block)
        hits.append(num_hits)
        start += len(request)
    return hits, evictions


CASES = [
    *itertools.product(("lru", "fifo"), ("prefix",), ("reverse", "forward")),
    *itertools.product(("lru", "fifo", "belady"), ("object",), ("forward",)),
    ("belady", "prefix", "forward"),
]


@pytest.mark.parametrize("chained", [True, False])
@pytest.mark.parametrize(("policy", "semantics", "touch"), CASES)
def test_replay_equals_lists(policy: str, semantics: str, touch: str, chained: bool) -> None:
    for seed in range(40):
        requests = random_requests(seed, chained)
        lengths = [max(0, 4 * len(request) - seed % 4) for request in requests]
        trace = make_trace(requests, 4, lengths)
        for capacity in (1, 2, 3, 5, 8, 1000):
            found = replay(trace, REQUEST_POLICIES[policy](), capacity, semantics, touch)
            hits, evictions = brute_force(requests, policy, capacity, semantics, touch)
            where = f"seed {seed}, capacity {capacity}"
            assert (found.block_hits, found.evictions) == (sum(hits), evictions), where
            tokens = sum(min(4 * count, length) for count, length in zip(hits, lengths))
            assert token_hit_ratio(trace, found.hits) == pytest.approx(tokens / max(1, sum(lengths))), where
            assert found.requests_larger_than_cache == sum(len(request) > capacity for request in requests)


@pytest.mark.parametrize("policy", ["lru", "lru-k", "belady"])
def test_object_hits_grow_with_capacity(policy: str) -> None:
    for seed in range(40):
        trace = make_trace(random_requests(seed, chained=False))
        hits = [
            replay(trace, REQUEST_POLICIES[policy](), capacity, "object").block_hits
            for capacity in range(1, trace.num_blocks + 1)
        ]
        assert hits == sorted(hits)


def test_belady_is_the_best_of_all_choices_of_victims() -> None:
    for seed in range(30):
        requests = random_requests(seed, chained=seed % 2 == 0)[:8]
        flat = [block for request in requests for block in request]
        if not flat:
            continue
        for capacity in (1, 2, 3):
            best = {frozenset(): 0}
            for block in flat:
                after: dict[frozenset[int], int] = {}
                for cache, hits in best.items():
                    if block in cache:
                        choices = [(cache, hits + 1)]
                    elif len(cache) < capacity:
                        choices = [(cache | {block}, hits)]
                    else:
                        choices = [(cache - {victim} | {block}, hits) for victim in cache]
                    for choice, count in choices:
                        after[choice] = max(after.get(choice, 0), count)
                best = after
            found = replay(make_trace(requests), REQUEST_POLICIES["belady"](), capacity, "object")
            assert found.block_hits == max(best.values()), f"seed {seed}, capacity {capacity}"


@pytest.mark.parametrize(
    ("requests", "capacity", "other", "touch", "belady_hits", "other_hits"),
    [
        ([[0, 1], [0]], 1, "lru", "reverse", 0, 1),  # a request larger than the cache
        ([[0, 1], [2], [3], [4, 5], [3], [0], [4, 5]], 3, "fifo", "forward", 2, 3),  # all of them fit
    ],
)
def test_belady_is_no_bound_of_prefix_hits(
    requests: list[list[int]], capacity: int, other: str, touch: str, belady_hits: int, other_hits: int
) -> None:
    trace = make_trace(requests)
    assert replay(trace, REQUEST_POLICIES["belady"](), capacity).block_hits == belady_hits
    assert replay(trace, REQUEST_POLICIES[other](), capacity, touch=touch).block_hits == other_hits


def test_rows_tell_the_touch_order_that_was_used() -> None:
    trace = make_trace([[0, 1], [0, 2]])
    lru, belady = REQUEST_POLICIES["lru"](), REQUEST_POLICIES["belady"]()
    assert replay(trace, lru, 2).touch == "reverse"
    assert replay(trace, lru, 2, touch="forward").touch == "forward"
    assert replay(trace, lru, 2, "object", "reverse").touch == "forward"
    assert replay(trace, belady, 2, touch="reverse").touch == "forward"


def test_next_accesses_equal_a_search() -> None:
    for seed in range(20):
        trace = make_trace(random_requests(seed, chained=False))
        ids = trace.ids.tolist()
        expected = [
            next((later for later in range(here + 1, len(ids)) if ids[later] == ids[here]), len(ids))
            for here in range(len(ids))
        ]
        np.testing.assert_array_equal(trace.next_accesses, expected)
