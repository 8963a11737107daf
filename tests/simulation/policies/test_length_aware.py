"""Length-aware equals a search over all blocks, and gives the hit ratios known for its conversation trace."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from timed_replay import Log, check

from pikv_core.simulation.policies.length_aware import LengthAware
from pikv_core.simulation.replay import replay
from pikv_core.simulation.trace import make_trace

FILE = Path(__file__).parents[4] / "shared/traces/mooncake_conversation_trace.jsonl"
OBJECT_HIT_RATIOS = {1000: 0.0504, 5000: 0.0801, 10000: 0.1123, 30000: 0.2028, 50000: 0.2602, 100000: 0.3345}


class Plain:
    def __init__(self, keep_counts: bool) -> None:
        self.keep_counts = keep_counts
        self.counts: dict[int, int] = {}
        self.used: dict[int, tuple[int, int]] = {}  # place and request

    def touch(self, block: int, place: int, request: int) -> None:
        self.counts[block] = self.counts.get(block, 0) + 1
        self.used[block] = place, request

    admit = touch

    def evict(self, incoming: int, place: int, request: int) -> int:
        victim = min(self.used, key=lambda held: (self.counts[held], -self.used[held][0], self.used[held][1]))
        del self.used[victim]
        if not self.keep_counts:
            del self.counts[victim]
        return victim


@pytest.mark.parametrize("keep_counts", [False, True])
def test_equals_plain(keep_counts: bool) -> None:
    def plain(log: Log, capacity: int) -> Plain:
        return Plain(keep_counts)

    check(LengthAware(keep_counts), plain)


def test_keys_hold_a_hundred_million_accesses() -> None:
    trace = make_trace([list(range(2000))])
    many = dataclasses.replace(trace, ids=np.broadcast_to(np.int32(0), 10**8))
    policy = LengthAware(keep_counts=True)
    starts, counts, settings, keys, *heap = policy.state(many, 2000)
    counts[:5] = [0, 10**6, 10**6, 10**6 + 1, 10**9]
    leaves_first = [(0, 0), (2, 1500), (1, 10), (3, 1500), (4, 1999)]
    for block, place in leaves_first:
        policy.admit((starts, counts, settings, keys, *heap), block, place, 0)
    in_order = [int(keys[block]) for block, _place in leaves_first]
    assert in_order == sorted(in_order)
    assert 0 < in_order[0] and in_order[-1] < 2**62


def test_known_hit_ratios() -> None:
    if not FILE.is_file():
        pytest.skip("the Mooncake conversation trace is not here")
    trace = make_trace([json.loads(line)["hash_ids"] for line in FILE.read_text().splitlines()])
    found = {
        capacity: round(replay(trace, LengthAware(), capacity, "object").block_hits / trace.ids.size, 4)
        for capacity in OBJECT_HIT_RATIOS
    }
    assert found == OBJECT_HIT_RATIOS
