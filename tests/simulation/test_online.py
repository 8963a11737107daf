"""Requests served one at a time give the hits, evictions and residents of a replay of all of them."""

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_replay import random_requests

from pikv_core.errors import UsageError
from pikv_core.simulation import online
from pikv_core.simulation.metrics import hit_row
from pikv_core.simulation.online import OnlineReplay, Request
from pikv_core.simulation.policies import REQUEST_POLICIES
from pikv_core.simulation.replay import replay
from pikv_core.simulation.trace import make_trace

NAMES = [name for name in REQUEST_POLICIES.names() if not REQUEST_POLICIES[name].knows_future]
CAPACITIES = (1, 2, 3, 5, 8, 13, 30, 1000)


def member(name, **options):
    made = REQUEST_POLICIES[name]
    listed = getattr(made, "listed", None)
    return made(**{listed: ("lru", "lfu"), **options}) if listed else made(**options)


def of_requests(requests, times_ms, block_tokens=16):
    return [Request(ids, time, block_tokens * len(ids) + 3) for ids, time in zip(requests, times_ms)]


def assert_equal(policy, requests, times_ms, capacity, touch, split=None):
    """Serve the requests, from `split` on by another object that was given those before; compare with a replay."""
    tokens = [16 * len(ids) + 3 for ids in requests]
    trace = make_trace(requests, block_tokens=16, input_tokens=tokens, timestamps_ms=list(times_ms))
    expected = replay(trace, policy, capacity, "prefix", touch, backend="python")
    served, hits = of_requests(requests, times_ms), []
    cache = OnlineReplay(policy, capacity, 16, touch)
    for number, request in enumerate(served):
        if number == split:
            cache = OnlineReplay(policy, capacity, 16, touch, served[:number])
        before = cache.residents()
        hits.append(cache.serve(request))
        assert policy.unbounded or len(cache.residents()) <= capacity
        leading = len(list(itertools.takewhile(before.__contains__, request.ids)))
        assert hits[-1] == leading or policy.expires
    assert hits == expected.hits.tolist()
    assert cache.row() == hit_row(trace, expected)
    assert cache.row(len(served) // 2) == hit_row(trace, expected, len(served) // 2)


def times_of(requests, seed):
    random_ = random.Random(seed)
    return list(itertools.accumulate(random_.choice((0.0, 1.0, 2_000.0, 200_000.0)) for _ in requests))


@pytest.mark.parametrize("name", NAMES)
def test_hits_are_those_of_a_replay(name, monkeypatch):
    for seed in range(12):
        monkeypatch.setattr(online, "LEAST_ROOM", (1, 3, 64)[seed % 3])
        requests = random_requests(seed)
        capacity, touch = CAPACITIES[seed // 2 % 8], ("forward", "reverse")[seed % 5 > 1]
        split = seed % (len(requests) + 1) if seed % 2 else None
        assert_equal(member(name), requests, times_of(requests, seed), capacity, touch, split)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(NAMES),
    st.lists(st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(0, 12), max_size=9), min_size=1, max_size=40),
    st.integers(1, 12),
    st.sampled_from(["forward", "reverse"]),
    st.integers(0, 40),
)
def test_any_log_gives_the_hits_of_a_replay(name, requests, capacity, touch, split):
    assert_equal(member(name), requests, times_of(requests, len(requests)), capacity, touch, split)


@pytest.mark.parametrize("name", ["lru", "s3fifo"])
def test_a_long_log_is_taken_up_by_the_compiled_loop(name, monkeypatch):
    requests = [ids for seed in range(12) for ids in random_requests(seed)]
    monkeypatch.setattr(online, "PYTHON_ACCESSES", 10)
    assert_equal(member(name), requests, [0.0] * len(requests), 20, None, len(requests) - 3)


def test_options_of_policies_are_theirs():
    requests = random_requests(3)
    mixed = member("switch", policies=("lru", "workload-aware"))
    for policy in (mixed, member("ttl", ttl_s=1.0, since="insertion"), member("gdsf", attention_tokens=64.0)):
        assert_equal(policy, requests, times_of(requests, 1), 8, "reverse")


def test_a_policy_that_knows_the_future_is_refused():
    with pytest.raises(UsageError, match="belady"):
        OnlineReplay(member("belady"), 4, 16)
