"""LFU against counts in a dictionary, and the golden ratios of the conversation trace (skipped where it is absent)."""

from __future__ import annotations

from pathlib import Path

import pytest
from plain_replay import assert_replay_equals_plain

from pikv_core.simulation.load import load
from pikv_core.simulation.policies.lfu import LFU
from pikv_core.simulation.replay import replay

FILE = Path(__file__).parents[4] / "shared/traces/mooncake_conversation_trace.jsonl"


class PlainLFU:
    def __init__(self, capacity: int):
        self.capacity = capacity
        self.counts: dict[int, int] = {}  # the least recently used first

    def __contains__(self, block: int) -> bool:
        return block in self.counts

    def hit(self, block: int) -> None:
        self.counts[block] = self.counts.pop(block) + 1

    def miss(self, block: int) -> bool:
        is_full = len(self.counts) == self.capacity
        if is_full:
            del self.counts[min(self.counts, key=lambda held: self.counts[held])]
        self.counts[block] = 1
        return is_full


def test_equals_counts() -> None:
    assert_replay_equals_plain(LFU(), PlainLFU)


def test_object_hit_ratios_of_the_conversation_trace() -> None:
    if not FILE.is_file():
        pytest.skip("the Mooncake conversation trace is not here")
    trace = load(str(FILE)).trace
    expected = {1000: 0.0481, 10000: 0.1318, 50000: 0.3438}
    found = {
        capacity: round(replay(trace, LFU(), capacity, "object").block_hits / trace.ids.size, 4)
        for capacity in expected
    }
    assert found == expected
