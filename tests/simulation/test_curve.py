"""The one-pass curve equals the replay of LRU at every capacity."""

from __future__ import annotations

import random

import numpy as np
import pytest

from pikv_core.simulation.ceiling import ceiling_hits
from pikv_core.simulation.curve import curve
from pikv_core.simulation.metrics import token_hit_ratio
from pikv_core.simulation.policies import REQUEST_POLICIES
from pikv_core.simulation.replay import replay
from pikv_core.simulation.trace import Trace, make_trace


def trace_of(seed: int, num_requests: int) -> Trace:
    """Return requests that extend, shorten and repeat one another, some with a block twice."""
    random_ = random.Random(seed)
    requests: list[list[int]] = [[0]]
    for _ in range(num_requests):
        kept = random_.choice(requests)
        requests.append(
            kept[: random_.randrange(len(kept) + 1)] + [random_.randrange(40) for _ in range(random_.randrange(5))]
        )
    return make_trace(requests, 3, [max(0, 3 * len(request) - 1) for request in requests])


@pytest.mark.parametrize("touch", ["reverse", "forward"])
@pytest.mark.parametrize("num_requests", [1, 5, 60, 400])
def test_curve_equals_replay_at_every_capacity(num_requests: int, touch: str) -> None:
    for seed in range(5):
        trace = trace_of(seed, num_requests)
        found = curve(trace, touch)
        assert found.block_hits[0] == 0
        assert found.block_hits.size == trace.num_blocks + 1
        for capacity in range(1, trace.num_blocks + 1):
            row = replay(trace, REQUEST_POLICIES["lru"](), capacity, touch=touch)
            assert found.block_hits[capacity] == row.block_hits
            assert found.token_hits[capacity] / max(1, found.input_tokens) == token_hit_ratio(trace, row.hits)
        assert np.all(np.diff(found.block_hits) >= 0)
        assert found.block_hits[-1] == ceiling_hits(trace, "prefix")


@pytest.mark.parametrize("touch", ["reverse", "forward"])
def test_twin_equals_compiled(touch: str) -> None:
    trace = trace_of(11, 300)
    assert trace.ids.size > 4 * (2 * trace.num_blocks + trace.blocks_per_request.max())  # slots run out often
    compiled, twin = curve(trace, touch), curve(trace, touch, backend="python")
    np.testing.assert_array_equal(compiled.block_hits, twin.block_hits)
    np.testing.assert_array_equal(compiled.token_hits, twin.token_hits)
