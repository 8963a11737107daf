"""Sessions on one clock: order, how many run at once, gaps, seeds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pikv_core.simulation.interleave import Session, interleave

HOWS = ["absolute", "poisson:0", "poisson:2.5", "closed-loop:1", "closed-loop:3"]


def session(times_s: list[float], answer_s: float = 0.0) -> Session:
    return Session(np.array(times_s, np.float64), max(times_s, default=0.0) + answer_s)


def owners(sessions: list[Session]) -> NDArray[np.int64]:
    return np.repeat(np.arange(len(sessions)), [one.times_s.size for one in sessions])


some_sessions = st.lists(
    st.builds(session, st.lists(st.integers(0, 50).map(float), max_size=6).map(sorted), st.integers(0, 5).map(float)),
    max_size=8,
)


@pytest.mark.parametrize("how", HOWS)
@given(sessions=some_sessions, seed=st.integers(0, 99))
@settings(derandomize=True, deadline=None, max_examples=60)
def test_every_request_once_in_order_of_time_and_of_its_session(how: str, sessions: list[Session], seed: int) -> None:
    order, timestamps_ms = interleave(sessions, how, seed)
    assert sorted(order.tolist()) == list(range(len(owners(sessions))))
    assert np.all(np.diff(timestamps_ms) >= 0)
    assert not timestamps_ms.size or timestamps_ms[0] == 0
    for place, one in enumerate(sessions):
        own = owners(sessions)[order] == place
        assert np.all(np.diff(order[own]) > 0)
        np.testing.assert_allclose(np.diff(timestamps_ms[own]), 1000 * np.diff(one.times_s), atol=1e-6)


def test_absolute_merges_by_the_sessions_own_times() -> None:
    order, timestamps_ms = interleave([session([0, 7, 9]), session([1, 7]), session([5])], "absolute", 0)
    assert order.tolist() == [0, 3, 5, 1, 4, 2]
    assert timestamps_ms.tolist() == [0, 1000, 5000, 7000, 7000, 9000]


def test_requests_of_sub_agents_merge_with_their_parents() -> None:
    order, _ = interleave([session([0, 10, 20, 4, 12])], "closed-loop:1", 0)
    assert order.tolist() == [0, 3, 1, 4, 2]


@given(sessions=some_sessions, num_running=st.integers(1, 4))
@settings(derandomize=True, deadline=None, max_examples=100)
def test_closed_loop_runs_so_many_at_a_time_in_order(sessions: list[Session], num_running: int) -> None:
    running = [one for one in sessions if one.times_s.size]
    order, timestamps_ms = interleave(sessions, f"closed-loop:{num_running}", 0)
    begins = np.array([timestamps_ms[owners(running)[order] == place].min() for place in range(len(running))])
    ends = begins + 1000 * np.array([one.end_s - one.begin_s for one in running])
    assert np.all(np.diff(begins) >= 0)
    assert np.all(begins[:num_running] == 0)
    for place, begin in enumerate(begins):
        others = [other for other in range(place) if ends[other] > begin]
        assert len(others) < num_running
        if place >= num_running:  # nobody waits while there is room
            assert np.isclose(ends[:place], begin).any()


def test_poisson_gaps_are_exponential_and_the_order_is_shuffled() -> None:
    sessions = [session([3.0])] * 20_000
    order, timestamps_ms = interleave(sessions, "poisson:60", 5)
    gaps_s = np.diff(timestamps_ms) / 1000
    assert abs(gaps_s.mean() / 60 - 1) < 0.03
    assert abs(gaps_s.std() / 60 - 1) < 0.03
    assert abs(np.corrcoef(order, np.arange(order.size))[0, 1]) < 0.03


def test_same_seed_same_result_other_seed_another() -> None:
    sessions = [session([0, 1, 2 + place]) for place in range(30)]
    first, again, other = (interleave(sessions, "poisson:1", seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(first[1], again[1])
    assert first[0].tolist() != other[0].tolist()


@pytest.mark.parametrize("how", HOWS)
def test_no_session_and_sessions_without_requests(how: str) -> None:
    for sessions in ([], [session([]), session([])]):
        order, timestamps_ms = interleave(sessions, how, 0)
        assert order.size == timestamps_ms.size == 0
