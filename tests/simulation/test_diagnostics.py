"""Diagnostics equal what a plain reading of the definitions counts."""

from __future__ import annotations

import dataclasses
import json
import math
import random

import numpy as np
import pytest

from pikv_core.runs import plain
from pikv_core.simulation.diagnostics import TIME_BINS, TURNS, Histogram, diagnose, hits_by_turn, reuse
from pikv_core.simulation.policies import REQUEST_POLICIES
from pikv_core.simulation.replay import replay
from pikv_core.simulation.trace import Trace, make_trace


def trace_of(seed: int, num_requests: int = 150, num_blocks: int = 40) -> Trace:
    """Return requests of random blocks at random times, some at once, of categories and turns."""
    draw = random.Random(seed)
    requests = [[draw.randrange(num_blocks) for _ in range(draw.randrange(6))] for _ in range(num_requests)]
    times = sorted(draw.choice([draw.random() * 1e5, draw.randrange(20) * 0.01]) for _ in requests)
    kinds = [draw.choice(["chat", "agent", "batch"]) for _ in requests]
    trace = make_trace(requests, timestamps_ms=[time - times[0] for time in times], categories=kinds)
    turns = np.array([draw.randrange(2 * TURNS) for _ in requests], np.int32)
    return dataclasses.replace(trace, turn=turns)


def accesses(trace: Trace) -> list[tuple[int, float]]:
    """Return block and time of each access."""
    times = np.repeat(trace.timestamps_ms, trace.blocks_per_request)
    return list(zip(trace.ids.tolist(), times.tolist(), strict=True))


def counted(histogram: Histogram) -> dict[float, int]:
    """Return the counts by the lower edges of the bins."""
    assert len(histogram.edges) == len(histogram.counts) + bool(histogram.counts)
    return {edge: count for edge, count in zip(histogram.edges, histogram.counts, strict=False) if count}


def binned(values: list[float]) -> dict[float, int]:
    """Count values by the power of two at or below them."""
    found: dict[float, int] = {}
    for value in sorted(values):
        edge = 2.0 ** math.floor(math.log2(value))
        found[edge] = found.get(edge, 0) + 1
    return found


@pytest.mark.parametrize("backend", ["python", "numba"])
@pytest.mark.parametrize("seed", range(4))
def test_reuse_equals_a_search_backwards(seed: int, backend: str) -> None:
    trace = trace_of(seed)
    distances: list[float] = []
    gaps_ms: list[float] = []
    whole = accesses(trace)
    for now, (block, time) in enumerate(whole):
        for then in range(now - 1, -1, -1):
            if whole[then][0] == block:
                distances.append(len({other for other, _ in whole[then:now]}))
                gaps_ms.append(time - whole[then][1])
                break
    found = reuse(trace, backend)
    assert counted(found.distances_blocks) == binned(distances)
    assert counted(found.times_ms) == binned([gap for gap in gaps_ms if gap >= 2.0**-10])
    assert found.at_same_time == sum(gap < 2.0**-10 for gap in gaps_ms) > 0
    assert found.accesses == len(whole)
    assert found.first_accesses == len(whole) - len(distances)


def test_edges_of_the_bins() -> None:
    times = [0.0, 1.0, 3.0, 6.9999, 2.0**40, 2.0**80]
    found = reuse(make_trace([[0]] * len(times), timestamps_ms=times), "python")
    assert counted(found.times_ms) == {1.0: 1, 2.0: 2, 2.0**39: 1, 2.0**63: 1}  # the last bin takes all that is longer
    assert found.times_ms.edges[0] == 1
    assert counted(found.distances_blocks) == {1.0: 5}
    ring = make_trace([[*range(7)], [*range(7)], [*range(7, 15)], [0]])
    assert counted(reuse(ring, "python").distances_blocks) == {4.0: 7, 8.0: 1}


def test_blocks_never_reused() -> None:
    assert reuse(make_trace([[0, 1, 2], [0, 3], [0]]), "python").blocks_never_reused_share == 0.75


@pytest.mark.parametrize("seed", range(3))
def test_hits_by_category_turn_and_time(seed: int) -> None:
    trace = trace_of(seed)
    hits = replay(trace, REQUEST_POLICIES["lru"](), 25, "object", backend="python").hits
    found = diagnose(trace, hits, "python")
    span = trace.timestamps_ms[-1]
    groups: dict[str, dict[str, list[int]]] = {"category": {}, "turn": {}, "time": {}}
    for request in range(trace.num_requests):
        row = (1, int(trace.blocks_per_request[request]), int(hits[request]))
        turn = int(trace.turn[request])
        names = {
            "category": trace.categories[trace.category[request]],
            "turn": str(turn) if turn < TURNS else f"{TURNS}+",
            "time": str(min(TIME_BINS - 1, int(trace.timestamps_ms[request] / span * TIME_BINS))),
        }
        for kind, name in names.items():
            before = groups[kind].get(name, [0, 0, 0])
            groups[kind][name] = [old + new for old, new in zip(before, row, strict=True)]
    for kind, rows in (("category", found.by_category), ("turn", found.by_turn)):
        assert {row.name: [row.requests, row.accesses, row.hits] for row in rows} == groups[kind]
        for row in rows:
            assert row.hit_ratio == (row.hits / row.accesses if row.accesses else None)
    assert [row.accesses for row in found.by_category] == sorted(
        (row.accesses for row in found.by_category), reverse=True
    )
    assert found.by_turn[-1].name == f"{TURNS}+"
    over = found.over_time
    for place in range(TIME_BINS):
        expected = groups["time"].get(str(place), [0, 0, 0])
        assert [over.requests[place], over.accesses[place], over.hits[place]] == expected
        assert over.hit_ratios[place] == (expected[2] / expected[1] if expected[1] else None)
    assert np.allclose(over.begins_s, np.arange(TIME_BINS) * over.bin_s)
    assert math.isclose(over.bin_s * TIME_BINS, span / 1000)


def test_twin_equals_compiled() -> None:
    trace = trace_of(9)
    hits = np.zeros(trace.num_requests, np.int64)
    assert diagnose(trace, hits) == diagnose(trace, hits, "python")


@pytest.mark.parametrize(
    "trace",
    [
        make_trace([[0, 1], [0], []], timestamps_ms=[0, 0, 0]),
        make_trace([[0, 1, 0]], timestamps_ms=[0]),
        make_trace([[], []]),
        make_trace([]),
    ],
)
@pytest.mark.parametrize("backend", ["python", "numba"])
def test_traces_that_tell_little(trace: Trace, backend: str) -> None:
    found = diagnose(trace, np.zeros(trace.num_requests, np.uint8), backend)
    assert sum(found.over_time.requests) == trace.num_requests
    assert sum(found.over_time.accesses) == sum(row.accesses for row in found.by_turn) == trace.ids.size
    assert found.reuse.at_same_time + sum(found.reuse.times_ms.counts) == trace.ids.size - trace.num_blocks
    assert sum(found.reuse.distances_blocks.counts) == trace.ids.size - trace.num_blocks
    assert json.loads(json.dumps(plain(found), allow_nan=False)) == plain(found)


def test_turns_that_are_not_told_are_one_row() -> None:
    trace = make_trace([[0], [0]])
    assert [row.name for row in hits_by_turn(trace, np.array([0, 1]))] == ["0"]
