"""Workload-aware equals a fit and a search over all blocks, made anew from all that came before."""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import numpy as np
import pytest
from timed_replay import Log, check, random_log

from pikv_core.simulation.policies.lru import LRU
from pikv_core.simulation.policies.workload_aware import WorkloadAware
from pikv_core.simulation.replay import replay
from pikv_core.simulation.trace import make_trace


class Plain:
    def __init__(self, policy: WorkloadAware, log: Log, capacity: int) -> None:
        self.policy, self.log = policy, log
        self.life_ms = 1000 * policy.life_s
        self.used: dict[int, tuple[int, int]] = {}  # when, in touches, and by which request
        self.now = 0
        self.fits: dict[int, dict[tuple[str, bool], tuple[float, float]]] = {}

    def touch(self, block: int, place: int, request: int) -> None:
        self.now += 1
        self.used[block] = self.now, request

    admit = touch

    def workload(self, request: int) -> tuple[str, bool]:
        return self.log.categories[request], self.log.turns[request] > 0

    def fit(self, request: int) -> dict[tuple[str, bool], tuple[float, float]]:
        """Return share and rate by workload, from the requests before the period of this one."""
        period = self.log.times_ms[request] // (1000 * self.policy.refit_s)
        if period in self.fits:
            return self.fits[period]
        waits: dict[tuple[str, bool], list[float | None]] = {}
        last: dict[int, int] = {}
        for earlier, blocks in enumerate(self.log.requests):
            if self.log.times_ms[earlier] // (1000 * self.policy.refit_s) >= period:
                break
            for block in set(blocks):
                if block in last:
                    wait = self.log.times_ms[earlier] - self.log.times_ms[last[block]]
                    waits.setdefault(self.workload(last[block]), []).append(wait)
                last[block] = earlier
        for request_ in last.values():
            waits.setdefault(self.workload(request_), []).append(None)
        fit = {}
        for name in ((category, later) for category in "ab" for later in (False, True)):
            known = [wait for wait in waits.get(name, []) if wait is not None]
            share = (len(known) + 1) / (len(waits.get(name, [])) + 2)
            fit[name] = share, (len(known) + 1) / (sum(known) + self.life_ms)
        return self.fits.setdefault(period, fit)

    def evict(self, incoming: int, place: int, request: int) -> int:
        def likely(block: int) -> tuple[float, tuple[str, bool], int]:
            when, by = self.used[block]
            share, rate = self.fit(request)[self.workload(by)]
            age_ms = self.log.times_ms[request] - self.log.times_ms[by]
            log_likely = math.log(share) + math.log(1 - math.exp(-rate * self.life_ms)) - rate * age_ms
            return round(log_likely, 9), self.workload(by), when

        victim = min(self.used, key=likely)
        del self.used[victim]
        return victim


@pytest.mark.parametrize("policy", [WorkloadAware(5.0, 4.0), WorkloadAware(1.0, 10.0), WorkloadAware(300.0, 0.5)])
def test_equals_plain(policy: WorkloadAware) -> None:
    check(policy, partial(Plain, policy), seeds=20, num_requests=40)


def test_one_workload_is_lru() -> None:
    for seed in range(20):
        log = random_log(seed)
        trace = make_trace(log.requests, 4, None, log.times_ms)
        for capacity in (1, 3, 8):
            ours, lru = (replay(trace, policy, capacity, backend="python") for policy in (WorkloadAware(), LRU()))
            assert ours.hits.tolist() == lru.hits.tolist()


def test_the_future_is_not_known() -> None:
    for seed in range(20):
        log = random_log(seed, 60)
        whole = replay(log.trace(), WorkloadAware(5.0, 4.0), 4, backend="python").hits
        for end in (20, 40):
            part = Log(log.requests[:end], log.times_ms[:end], log.categories[:end], log.turns[:end])
            assert (
                replay(part.trace(), WorkloadAware(5.0, 4.0), 4, backend="python").hits.tolist() == whole[:end].tolist()
            )


def test_a_workload_that_is_never_used_again_makes_room() -> None:
    """Chats come back after ten others; a file is never asked about again."""
    requests, categories = [], []
    for step in range(400):
        requests += [[step % 10], [1000 + step]]
        categories += ["chat", "file"]
    trace = make_trace(requests, 4, None, [1000.0 * step for step in range(800)], categories)
    ours, lru = (replay(trace, policy, 12, "object", backend="python") for policy in (WorkloadAware(), LRU()))
    assert lru.block_hits == 0
    assert ours.hits[-200:].sum() == 100


def test_fits_of_a_trace_whose_first_request_has_no_blocks() -> None:
    trace = dataclasses.replace(make_trace([[], [0], [], [0, 1]]), turn=np.array([0, 1, 0, 1], np.int32))
    assert replay(trace, WorkloadAware(), 1, backend="python").block_hits == 1
