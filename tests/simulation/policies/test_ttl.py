"""TTL equals a search over the ages of all blocks, and without an end to them is LRU."""

from __future__ import annotations

from functools import partial

import pytest
from timed_replay import Log, check, random_log

from pikv_core.simulation.policies.lru import LRU
from pikv_core.simulation.policies.ttl import TTL
from pikv_core.simulation.replay import replay
from pikv_core.simulation.trace import make_trace


class Plain:
    def __init__(self, policy: TTL, log: Log, capacity: int) -> None:
        self.policy = policy
        self.times_ms = log.times_ms
        self.by_use: list[int] = []
        self.entered_ms: dict[int, float] = {}
        self.used_ms: dict[int, float] = {}

    def touch(self, block: int, place: int, request: int) -> None:
        self.used_ms[block] = self.times_ms[request]
        self.by_use.remove(block)
        self.by_use.append(block)

    def admit(self, block: int, place: int, request: int) -> None:
        self.used_ms[block] = self.entered_ms[block] = self.times_ms[request]
        self.by_use.append(block)

    def evict(self, incoming: int, place: int, request: int) -> int:
        return self.by_use.pop(0)

    def expire(self, request: int) -> list[int]:
        since = self.used_ms if self.policy.since == "use" else self.entered_ms
        now_ms, ttl_ms = self.times_ms[request], 1000 * self.policy.ttl_s
        gone = [block for block in self.by_use if now_ms - since[block] > ttl_ms]
        self.by_use = [block for block in self.by_use if block not in gone]
        return gone


@pytest.mark.parametrize("ttl_s", [0.0, 1.0, 2.5, 6.0, 1e9])
@pytest.mark.parametrize("since", ["use", "insertion"])
def test_equals_plain(ttl_s: float, since: str) -> None:
    policy = TTL(ttl_s, since)
    check(policy, partial(Plain, policy), seeds=12)


def test_without_an_end_it_is_lru() -> None:
    for seed in range(20):
        trace = random_log(seed).trace()
        for capacity in (1, 3, 8):
            ours, lru = (replay(trace, policy, capacity, backend="python") for policy in (TTL(1e9), LRU()))
            assert ours.hits.tolist() == lru.hits.tolist()
            assert ours.expirations == 0


def test_a_block_is_held_until_its_time_and_no_longer() -> None:
    for end_ms, hits in ((5000.0, 1), (5001.0, 0)):
        trace = make_trace([[0], [0]], timestamps_ms=[0.0, end_ms])
        found = replay(trace, TTL(5), 1, backend="python")
        assert (found.block_hits, found.expirations, found.evictions) == (hits, 1 - hits, 0)
    uses = make_trace([[0], [0], [0]], timestamps_ms=[0.0, 4000.0, 8000.0])
    assert replay(uses, TTL(5, "use"), 1, backend="python").block_hits == 2
    assert replay(uses, TTL(5, "insertion"), 1, backend="python").block_hits == 1
