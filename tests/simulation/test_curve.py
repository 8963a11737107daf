"""The one-pass curve equals the replay of LRU, and plain lists, at every capacity."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pikv_core.errors import UsageError
from pikv_core.simulation import replay as replay_module
from pikv_core.simulation.ceiling import ceiling_hits
from pikv_core.simulation.curve import Curve, curve, worthwhile_capacity
from pikv_core.simulation.metrics import hit_tokens
from pikv_core.simulation.policies import REQUEST_POLICIES
from pikv_core.simulation.replay import replay
from pikv_core.simulation.trace import Trace, make_trace

BLOCK_TOKENS = 3
KINDS = [("prefix", "reverse"), ("prefix", "forward"), ("object", "forward")]


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    """Return requests that are empty, repeat blocks, extend earlier ones, or name their whole prefix (chained).

    Lengths are now and then shorter than the blocks before the last, as no prompt's should be.
    """
    blocks = st.lists(st.integers(0, draw(st.sampled_from([2, 12, 60]))), max_size=8)
    requests: list[list[int]] = [draw(blocks)]
    for added in draw(st.lists(blocks, max_size=30)):
        before = requests[draw(st.integers(0, len(requests) - 1))]
        requests.append(before[: draw(st.integers(0, len(before)))] + added)
    if draw(st.booleans()):
        ids: dict[tuple[int, ...], int] = {}
        requests = [
            [ids.setdefault(tuple(request[: end + 1]), len(ids)) for end in range(len(request))] for request in requests
        ]
    missing = draw(st.lists(st.sampled_from([0, 0, 1, 2, 3, 10]), min_size=len(requests), max_size=len(requests)))
    lengths = [max(0, BLOCK_TOKENS * len(request) - short) for request, short in zip(requests, missing)]
    return make_trace(requests, BLOCK_TOKENS, lengths)


def long_trace(seed: int, num_requests: int) -> Trace:
    """Return many requests over few blocks, with runs longer than a chunk of slots, so that slots run out often."""
    random_ = random.Random(seed)
    paths = [[200 * path + block for block in range(200)] for path in range(3)]
    requests = [
        random_.choice(paths)[: random_.randrange(200)] + random_.choices(range(600, 640), k=random_.randrange(5))
        for _ in range(num_requests)
    ]
    return make_trace(requests, BLOCK_TOKENS, [max(0, BLOCK_TOKENS * len(request) - 1) for request in requests])


def assert_equals_replay(trace: Trace, found: Curve, capacities: list[int]) -> None:
    for capacity in capacities:
        row = replay(trace, REQUEST_POLICIES["lru"](), capacity, found.semantics, found.touch)
        at = min(capacity, trace.num_blocks)
        assert found.block_hits[at] == row.block_hits
        assert found.token_hits[at] == hit_tokens(trace, row.hits).sum()


@pytest.mark.parametrize(("semantics", "touch"), KINDS)
@settings(derandomize=True, deadline=None, max_examples=500)
@given(trace=traces(), capacities=st.lists(st.integers(1, 80), min_size=1, max_size=4))
def test_curve_equals_replay(trace: Trace, capacities: list[int], semantics: str, touch: str) -> None:
    found = curve(trace, touch, semantics)
    assert_equals_replay(trace, found, capacities)
    assert found.block_hits.size == found.token_hits.size == trace.num_blocks + 1
    assert found.block_hits[0] == found.token_hits[0] == 0
    assert (np.diff(found.block_hits) >= 0).all()
    assert (np.diff(found.token_hits) >= 0).all()
    assert found.block_hits[-1] == ceiling_hits(trace, semantics)


@pytest.mark.parametrize(("semantics", "touch"), KINDS)
def test_curve_equals_replay_at_every_capacity_of_a_long_trace(semantics: str, touch: str) -> None:
    trace = long_trace(3, 120)
    assert trace.ids.size > 4 * (2 * trace.num_blocks + trace.blocks_per_request.max())  # slots run out often
    assert_equals_replay(trace, curve(trace, touch, semantics), list(range(1, trace.num_blocks + 1)))


@pytest.mark.parametrize("num_slots_more", [0, 1, 63])
def test_depths_equal_a_list(num_slots_more: int) -> None:
    random_ = random.Random(num_slots_more)
    requests = [random_.choices(range(70), k=random_.randrange(4)) for _ in range(300)] + [[0] * num_slots_more]
    stack: list[int] = []
    depths = []
    for request in requests:
        for block in request:
            if block in stack:
                depths.append(stack.index(block) + 1)
                stack.remove(block)
            stack.insert(0, block)
    expected = np.cumsum(np.bincount(depths, minlength=71))
    np.testing.assert_array_equal(curve(make_trace(requests), semantics="object").block_hits, expected)


@pytest.mark.parametrize(("semantics", "touch"), KINDS)
@pytest.mark.parametrize("slice_accesses", [10**6, 50])
def test_twin_equals_compiled(semantics: str, touch: str, slice_accesses: int, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = long_trace(11, 60)
    whole = curve(trace, touch, semantics)
    monkeypatch.setattr(replay_module, "SLICE_ACCESSES", slice_accesses)
    told: list[tuple[int, int]] = []
    twin = curve(trace, touch, semantics, "python", progress=lambda done, of: told.append((done, of)))
    np.testing.assert_array_equal(whole.block_hits, twin.block_hits)
    np.testing.assert_array_equal(whole.token_hits, twin.token_hits)
    assert told[-1] == (60, 60)
    assert len(told) == 1 if slice_accesses > trace.ids.size else len(told) > 20
    assert all(before[0] < after[0] for before, after in pairwise(told))


@pytest.mark.parametrize(("semantics", "touch"), KINDS)
@settings(derandomize=True, deadline=None, max_examples=100)
@given(trace=traces(), capacity=st.integers(1, 80), data=st.data())
def test_requests_of_the_warm_up_are_replayed_and_not_counted(
    trace: Trace, capacity: int, data: st.DataObject, semantics: str, touch: str
) -> None:
    warm_up = data.draw(st.integers(0, trace.num_requests - 1))
    found = curve(trace, touch, semantics, warm_up=warm_up)
    row = replay(trace, REQUEST_POLICIES["lru"](), capacity, semantics, touch)
    at = min(capacity, trace.num_blocks)
    assert found.block_hits[at] == row.hits[warm_up:].sum()
    assert found.token_hits[at] == hit_tokens(trace, row.hits)[warm_up:].sum()
    assert found.block_accesses == trace.blocks_per_request[warm_up:].sum()
    assert found.input_tokens == trace.input_tokens[warm_up:].sum()
    assert found.block_hits[-1] == ceiling_hits(trace, semantics, warm_up=warm_up)


def test_object_curve_tells_that_it_touched_forward() -> None:
    trace = make_trace([[0, 1], [0, 1]])
    assert curve(trace, "reverse", "object").touch == "forward"
    assert curve(trace, "reverse").touch == "reverse"


@settings(derandomize=True, deadline=None, max_examples=100)
@given(trace=traces(), share=st.integers(0, 100))
def test_worthwhile_capacity_is_the_least_that_reaches_the_share(trace: Trace, share: int) -> None:
    hits = curve(trace).block_hits.tolist()
    enough = [capacity for capacity, count in enumerate(hits) if 100 * count >= share * hits[-1]]
    assert worthwhile_capacity(curve(trace), share / 100) == enough[0]


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_no_share_outside_0_to_1(share: float) -> None:
    with pytest.raises(UsageError, match="share: expected a number from 0 to 1"):
        worthwhile_capacity(curve(make_trace([[0], [0]])), share)
