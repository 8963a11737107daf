"""W-TinyLFU equals the same rules over plain lists; its counts tell what is popular now, not once."""

from __future__ import annotations

from functools import partial

import pytest
from timed_replay import Log, check

from pikv_core.simulation.policies.lru import LRU
from pikv_core.simulation.policies.wtinylfu import WTinyLFU
from pikv_core.simulation.replay import replay
from pikv_core.simulation.trace import make_trace


class Plain:
    """Lists hold the block that leaves next first; every count is halved when a period of accesses ends."""

    def __init__(self, policy: WTinyLFU, log: Log, capacity: int) -> None:
        capacity = min(capacity, len({block for request in log.requests for block in request}))
        self.window_blocks = max(1, int(policy.window_share * capacity))
        self.protected_blocks = int(policy.protected_share * (capacity - self.window_blocks))
        self.period = 10 * capacity
        self.num_accesses = 0
        self.counts: dict[int, int] = {}
        self.window: list[int] = []
        self.probation: list[int] = []
        self.protected: list[int] = []

    def _count(self, block: int) -> None:
        self.counts[block] = self.counts.get(block, 0) + 1
        self.num_accesses += 1
        if self.num_accesses % self.period == 0:
            self.counts = {held: count // 2 for held, count in self.counts.items()}

    def touch(self, block: int, place: int, request: int) -> None:
        self._count(block)
        if block in self.window:
            self.window.remove(block)
            self.window.append(block)
            return
        (self.probation if block in self.probation else self.protected).remove(block)
        self.protected.append(block)
        if len(self.protected) > self.protected_blocks:
            self.probation.append(self.protected.pop(0))

    def admit(self, block: int, place: int, request: int) -> None:
        self._count(block)
        self.window.append(block)
        if len(self.window) > self.window_blocks:
            self.probation.append(self.window.pop(0))

    def evict(self, incoming: int, place: int, request: int) -> int:
        main = self.probation or self.protected
        if main and self.counts[self.window[0]] > self.counts[main[0]]:
            self.probation.append(self.window.pop(0))
            return main.pop(0)
        return self.window.pop(0)


@pytest.mark.parametrize("policy", [WTinyLFU(), WTinyLFU(0.3, 0.5), WTinyLFU(1.0), WTinyLFU(0.0, 1.0)])
def test_equals_plain(policy: WTinyLFU) -> None:
    check(policy, partial(Plain, policy))


def test_a_scan_leaves_what_is_used_often() -> None:
    popular, scanned = [[block] for block in range(20)], [[block] for block in range(100, 180)]
    trace = make_trace([*popular * 5, *scanned, *popular])
    kept = replay(trace, WTinyLFU(), 30, "object", backend="python").hits[-20:].sum()
    assert kept >= 19
    assert replay(trace, LRU(), 30, "object", backend="python").hits[-20:].sum() == 0


def test_old_popularity_is_forgotten() -> None:
    old, new = [[block] for block in range(20)], [[block] for block in range(100, 120)]
    trace = make_trace([*old * 50, *new * 100])
    assert replay(trace, WTinyLFU(), 20, "object", backend="python").hits[-20:].sum() >= 18
