"""S3-FIFO against three lists, and its object hits on the conversation trace (skipped where it is absent)."""

from __future__ import annotations

from pathlib import Path

import pytest
from plain_replay import assert_replay_equals_plain

from pikv_core.simulation.load import load
from pikv_core.simulation.policies.s3fifo import S3FIFO
from pikv_core.simulation.replay import replay

FILE = Path(__file__).parents[4] / "shared/traces/mooncake_conversation_trace.jsonl"


class ThreeLists:
    def __init__(self, capacity: int, small: float, ghost: float, threshold: int):
        self.small_room = max(1, int(small * capacity))
        self.main_room = capacity - self.small_room
        self.ghost_room, self.threshold = int(ghost * capacity), threshold
        self.small: list[int] = []
        self.main: list[int] = []
        self.ghosts: list[int] = []
        self.hits: dict[int, int] = {}
        self.has_evicted = False

    def __contains__(self, block: int) -> bool:
        return block in self.hits

    def hit(self, block: int) -> None:
        self.hits[block] += 1

    def miss(self, block: int) -> bool:
        returns = block in self.ghosts
        if returns:
            self.ghosts.remove(block)
        is_full = len(self.hits) == self.small_room + self.main_room
        while len(self.hits) == self.small_room + self.main_room:
            self.has_evicted = True
            if self.small and len(self.main) <= self.main_room:
                self.shift_small()
            else:
                self.shift_main()
        fills_main = not self.has_evicted and len(self.small) >= self.small_room
        (self.main if returns or fills_main else self.small).append(block)
        self.hits[block] = 0
        return is_full

    def shift_small(self) -> None:
        while self.small:
            block = self.small.pop(0)
            if self.hits[block] < self.threshold:
                del self.hits[block]
                self.ghosts = [*self.ghosts, block][-self.ghost_room :] if self.ghost_room else []
                return
            self.main.append(block)
            self.hits[block] = 0

    def shift_main(self) -> None:
        block = self.main.pop(0)
        if not self.hits[block]:
            del self.hits[block]
            return
        self.main.append(block)
        self.hits[block] = min(3, self.hits[block]) - 1


@pytest.mark.parametrize(("small", "ghost", "threshold"), [(0.1, 0.9, 2), (0.4, 0.5, 1), (0.5, 0.0, 1), (0.2, 3.0, 2)])
def test_equals_three_lists(small: float, ghost: float, threshold: int) -> None:
    policy = S3FIFO(small, ghost, threshold)
    assert_replay_equals_plain(policy, lambda capacity: ThreeLists(capacity, small, ghost, threshold), num_seeds=20)


def test_object_hits_of_the_conversation_trace() -> None:
    if not FILE.is_file():
        pytest.skip("the Mooncake conversation trace is not here")
    trace = load(str(FILE)).trace
    found = {capacity: replay(trace, S3FIFO(), capacity, "object").block_hits for capacity in (1000, 10000, 50000)}
    assert found == {1000: 15676, 10000: 55525, 50000: 82850}  # as libCacheSim 0.3.5 counts them
