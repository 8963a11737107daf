"""Object hits are those that libCacheSim 0.3.5 counts, on a made trace of popular blocks and scans."""

from __future__ import annotations

import pytest

from pikv_core.simulation.policies import REQUEST_POLICIES
from pikv_core.simulation.replay import replay
from pikv_core.simulation.trace import Trace, make_trace

NUM_ACCESSES = 20_000
HITS = {  # at 20, 60 and 200 blocks
    "lru": [1172, 3373, 9033],
    "fifo": [1169, 3222, 8411],
    "lfu": [1703, 4603, 11169],
    "clock": [1202, 3434, 9346],
    "sieve": [1886, 5052, 11586],
    "s3fifo": [1994, 4776, 11258],
    "arc": [1629, 4347, 10773],
    "belady": [5447, 9230, 14480],
}


@pytest.fixture(scope="module")
def trace() -> Trace:
    draw, ids = 1, []
    for step in range(NUM_ACCESSES):
        draw = draw * 48271 % (2**31 - 1)
        popular = draw % 600 * (draw // 1024 % 600) // 600
        ids.append(step if step % 1000 < 100 else NUM_ACCESSES + popular)
    return make_trace([[block] for block in ids])


@pytest.mark.parametrize("policy", HITS)
def test_object_hits(trace: Trace, policy: str) -> None:
    member = REQUEST_POLICIES[policy]()
    found = [replay(trace, member, capacity, "object").block_hits for capacity in (20, 60, 200)]
    assert found == HITS[policy]
