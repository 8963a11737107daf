"""The ceiling equals a set of everything seen, and its memory does not grow with the accesses."""

from __future__ import annotations

import tracemalloc
from itertools import takewhile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pikv_core.simulation.ceiling import ceiling_hits
from pikv_core.simulation.trace import make_trace

REQUESTS = st.lists(st.lists(st.integers(0, 12), max_size=9), min_size=1, max_size=25)


@pytest.mark.parametrize("backend", ["numba", "python"])
@settings(derandomize=True, deadline=None, max_examples=300)
@given(requests=REQUESTS, warm_up=st.integers(0, 25))
def test_ceiling_equals_sets(requests: list[list[int]], warm_up: int, backend: str) -> None:
    trace = make_trace(requests)
    seen: set[int] = set()
    prefix_hits = object_hits = 0
    for number, request in enumerate(requests):
        is_counted = number >= warm_up
        prefix_hits += is_counted * len(list(takewhile(seen.__contains__, request)))
        for block in request:
            object_hits += is_counted and block in seen
            seen.add(block)
    assert ceiling_hits(trace, "prefix", backend, warm_up) == prefix_hits
    assert ceiling_hits(trace, "object", backend, warm_up) == object_hits


def test_memory_is_one_byte_a_block() -> None:
    trace = make_trace([list(range(1000))] * 200)
    ceiling_hits(trace, "prefix")  # compiled now
    tracemalloc.start()
    ceiling_hits(trace, "prefix")
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < trace.num_blocks + 20_000 < np.int32().itemsize * trace.ids.size
