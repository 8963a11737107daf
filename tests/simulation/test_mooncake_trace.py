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
OBJECT_HITS = {  # as libCacheSim 0.3.5 counts them
    "fifo": {1000: 12559, 10000: 53812, 50000: 98096},
    "lfu": {1000: 13871, 10000: 38013, 50000: 99189},
    "lru": {1000: 12831, 10000: 60921, 50000: 102290},
    "sieve": {1000: 13871, 10000: 38013, 50000: 99189},
    "belady": {1000: 54994, 10000: 105710, 50000: 105710},
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


@pytest.mark.parametrize("policy", OBJECT_HITS)
def test_object_hits(trace: Trace, policy: str) -> None:
    expected = OBJECT_HITS[policy]
    hits = {capacity: replay(trace, REQUEST_POLICIES[policy](), capacity, "object").block_hits for capacity in expected}
    assert hits == expected
