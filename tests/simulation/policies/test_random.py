"""Random victims: against a list, by the seed, and equally often."""

from __future__ import annotations

import pytest
from plain_replay import assert_replay_equals_plain, random_requests

from pikv_core.simulation.policies.random import Random
from pikv_core.simulation.replay import replay
from pikv_core.simulation.trace import make_trace


class PlainList:
    def __init__(self, capacity: int, seed: int):
        self.capacity, self.draw = capacity, seed % (2**31 - 2) + 1
        self.held: list[int] = []

    def __contains__(self, block: int) -> bool:
        return block in self.held

    def hit(self, block: int) -> None:
        pass

    def miss(self, block: int) -> bool:
        is_full = len(self.held) == self.capacity
        if is_full:
            self.draw = self.draw * 48271 % (2**31 - 1)
            place = self.draw % self.capacity
            self.held[place] = self.held[-1]
            self.held.pop()
        self.held.append(block)
        return is_full


@pytest.mark.parametrize("seed", [0, 7, 2**40])
def test_equals_a_list(seed: int) -> None:
    assert_replay_equals_plain(Random(seed), lambda capacity: PlainList(capacity, seed), num_seeds=20)


def test_seeds_differ() -> None:
    trace = make_trace(random_requests(4))
    hits = {tuple(replay(trace, Random(seed), 6, backend="python").hits.tolist()) for seed in range(8)}
    assert len(hits) > 4


def test_every_resident_block_is_as_likely_a_victim() -> None:
    capacity, rounds = 10, 20_000
    policy = Random(seed=3)
    state = policy.state(make_trace([list(range(capacity + 1))]), capacity)
    for block in range(capacity):
        policy.admit(state, block, 0, 0)
    outside, times = capacity, [0] * (capacity + 1)
    for _ in range(rounds):
        victim = int(policy.evict(state, outside, 0, 0))
        policy.admit(state, outside, 0, 0)
        times[victim] += 1
        outside = victim
    expected = rounds / (capacity + 1)
    assert sum((count - expected) ** 2 / expected for count in times) < 35  # chi square, 10 degrees: 1 in 10,000
