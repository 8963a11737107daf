"""The golden integers of the Mooncake conversation trace; skipped where the trace is absent."""

from __future__ import annotations

from pathlib import Path

import pytest

from pikv_core.simulation.ceiling import ceiling_hits
from pikv_core.simulation.curve import curve
from pikv_core.simulation.load import load
from pikv_core.simulation.policies import REQUEST_POLICIES
from pikv_core.simulation.replay import replay
from pikv_core.simulation.trace import Trace

FILE = Path(__file__).parents[3] / "shared/traces/mooncake_conversation_trace.jsonl"
LRU_PREFIX_HITS = {1000: 12847, 5000: 32260, 10000: 61046, 30000: 93978, 50000: 102290, 100000: 104924}
OBJECT_HIT_RATIOS = {
    "fifo": {1000: 0.0435, 10000: 0.1865, 50000: 0.3400},
    "lru": {1000: 0.0445, 10000: 0.2112, 50000: 0.3546},
    "belady": {1000: 0.1906, 10000: 0.3664, 50000: 0.3664},
}


@pytest.fixture(scope="module")
def trace() -> Trace:
    if not FILE.is_file():
        pytest.skip("the Mooncake conversation trace is not here")
    return load(str(FILE)).trace


def test_size(trace: Trace) -> None:
    assert (trace.num_requests, trace.ids.size, trace.num_blocks) == (12031, 288500, 182790)
    assert trace.block_tokens == 512


def test_prefix_hits(trace: Trace) -> None:
    hits = {capacity: replay(trace, REQUEST_POLICIES["lru"](), capacity).block_hits for capacity in LRU_PREFIX_HITS}
    assert hits == LRU_PREFIX_HITS
    assert ceiling_hits(trace, "prefix") == 105710


def test_curve(trace: Trace) -> None:
    found = curve(trace).block_hits
    assert {capacity: found[capacity] for capacity in LRU_PREFIX_HITS} == LRU_PREFIX_HITS
    assert found[-1] == 105710


@pytest.mark.parametrize("policy", OBJECT_HIT_RATIOS)
def test_object_hit_ratios(trace: Trace, policy: str) -> None:
    expected = OBJECT_HIT_RATIOS[policy]
    found = {
        capacity: round(replay(trace, REQUEST_POLICIES[policy](), capacity, "object").block_hits / trace.ids.size, 4)
        for capacity in expected
    }
    assert found == expected
