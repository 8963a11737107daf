"""LRU-K against whole histories, and against LRU for K = 1."""

from __future__ import annotations

import pytest
from plain_replay import assert_replay_equals_plain, random_requests

from pikv_core.simulation.policies.lru import LRU
from pikv_core.simulation.policies.lru_k import LRUK
from pikv_core.simulation.replay import replay
from pikv_core.simulation.trace import make_trace


class WholeHistories:
    def __init__(self, capacity: int, k: int):
        self.capacity, self.k = capacity, k
        self.held: set[int] = set()
        self.times: dict[int, list[int]] = {}
        self.now = 0

    def __contains__(self, block: int) -> bool:
        return block in self.held

    def hit(self, block: int) -> None:
        self.now += 1
        self.times.setdefault(block, []).append(self.now)

    def miss(self, block: int) -> bool:
        is_full = len(self.held) == self.capacity
        if is_full:
            self.held.remove(min(self.held, key=self.rank))
        self.held.add(block)
        self.hit(block)
        return is_full

    def rank(self, block: int) -> tuple[bool, int]:
        times = self.times[block]
        has_k = len(times) >= self.k
        return has_k, times[-self.k] if has_k else times[-1]


@pytest.mark.parametrize("k", [1, 2, 3])
def test_equals_whole_histories(k: int) -> None:
    assert_replay_equals_plain(LRUK(k), lambda capacity: WholeHistories(capacity, k), num_seeds=20)


def test_the_last_access_alone_is_lru() -> None:
    for seed in range(20):
        trace = make_trace(random_requests(seed))
        for capacity in (1, 3, 7, 15):
            found = replay(trace, LRUK(1), capacity, backend="python")
            assert found.hits.tolist() == replay(trace, LRU(), capacity, backend="python").hits.tolist()
