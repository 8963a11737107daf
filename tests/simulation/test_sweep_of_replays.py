"""A sweep yields its replays in order on any number of threads, passes errors on, and stops when closed."""

from __future__ import annotations

import random
import threading
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest

from pikv_core.errors import PiKVError
from pikv_core.simulation import sweep as module
from pikv_core.simulation.policies.lru import LRU
from pikv_core.simulation.replay import replay
from pikv_core.simulation.sweep import sweep
from pikv_core.simulation.trace import Trace, make_trace

_RANDOM = random.Random(0)
TRACE = make_trace([[_RANDOM.randrange(12) for _ in range(4)] for _ in range(30)])
CAPACITIES = [9, 1, 5, 3, 7, 2, 5]


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "replay", lambda *given, **named: replay(*given, **named, backend="python"))


@dataclass(frozen=True)
class Broken(LRU):
    name: ClassVar[str] = "broken"

    def state(self, trace: Trace, capacity_blocks: int) -> tuple[Any, ...]:
        raise PiKVError("broken: no state")


@pytest.mark.parametrize("threads", [1, 2, 3, 50])
def test_replays_come_in_order_whatever_the_threads(threads: int) -> None:
    told: dict[int, float] = {}
    pairs = [(LRU(), capacity) for capacity in CAPACITIES]
    found = list(sweep(TRACE, pairs, "prefix", None, threads, told.__setitem__))
    assert [each.capacity_blocks for each in found] == CAPACITIES
    for each in found:
        alone = replay(TRACE, LRU(), each.capacity_blocks, backend="python")
        assert each.hits.tolist() == alone.hits.tolist()
    assert told == dict.fromkeys(range(len(pairs)), 1.0)


@pytest.mark.parametrize("threads", [1, 3])
def test_an_error_in_a_replay_comes_out(threads: int) -> None:
    replays = sweep(TRACE, [(LRU(), 3), (Broken(), 3), (LRU(), 5)], "prefix", None, threads)
    assert next(replays).capacity_blocks == 3
    with pytest.raises(PiKVError, match="broken: no state"):
        next(replays)
    assert list(replays) == []


def test_closing_stops_what_is_under_way_and_begins_nothing_more() -> None:
    before = threading.active_count()
    begun: list[int] = []
    pairs = [(LRU(), 3)] * 100
    replays = sweep(TRACE, pairs, "prefix", None, 2, lambda index, share: begun.append(index))
    next(replays)
    replays.close()
    assert threading.active_count() == before
    assert len(set(begun)) < 10


def test_no_pairs_no_replays() -> None:
    assert list(sweep(TRACE, [], "prefix", None)) == []
