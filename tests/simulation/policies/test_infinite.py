"""The infinite cache: hits are the ceiling at any capacity, and nothing leaves."""

from __future__ import annotations

import pytest
from plain_replay import WAYS, random_requests

from pikv_core.simulation.ceiling import ceiling_hits
from pikv_core.simulation.policies.infinite import Infinite
from pikv_core.simulation.replay import Semantics, Touch, replay
from pikv_core.simulation.trace import make_trace


@pytest.mark.parametrize(("semantics", "touch"), WAYS)
def test_hits_are_the_ceiling(semantics: Semantics, touch: Touch) -> None:
    for seed in range(20):
        trace = make_trace(random_requests(seed))
        for capacity in (1, 5, 1000):
            found = replay(trace, Infinite(), capacity, semantics, touch, backend="python")
            assert found.block_hits == ceiling_hits(trace, semantics)
            assert (found.evictions, found.requests_larger_than_cache, found.capacity_blocks) == (0, 0, capacity)
