"""A switch equals the same rules over plain policies, begins as its first member, and follows the better one."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from timed_replay import CAPACITIES, Log, check, random_log

from pikv_core import recipes
from pikv_core.components import Component, build
from pikv_core.errors import UsageError
from pikv_core.simulation.policies import REQUEST_POLICIES
from pikv_core.simulation.policies.switch import ACTIVE, CHANGES, Switch
from pikv_core.simulation.replay import replay
from pikv_core.simulation.trace import make_trace


class PlainLRU:
    def __init__(self) -> None:
        self.now = 0
        self.used: dict[int, int] = {}

    def touch(self, block: int) -> None:
        self.now += 1
        self.used[block] = self.now

    def evict(self) -> int:
        return min(self.used, key=self.used.__getitem__)

    def forget(self, block: int) -> None:
        del self.used[block]


class PlainLFU(PlainLRU):
    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[int, int] = {}

    def touch(self, block: int) -> None:
        super().touch(block)
        self.counts[block] = self.counts.get(block, 0) + 1

    def evict(self) -> int:
        return min(self.used, key=lambda held: (self.counts[held], self.used[held]))

    def forget(self, block: int) -> None:
        super().forget(block)
        del self.counts[block]


PLAIN: dict[str, Any] = {"lru": PlainLRU, "lfu": PlainLFU}


class Plain:
    def __init__(self, policy: Switch, log: Log, capacity: int) -> None:
        self.policy = policy
        self.capacity = min(capacity, len({block for request in log.requests for block in request}))
        self.orders = [PLAIN[name]() for name in policy.policies]
        self.directories = [PLAIN[name]() for name in policy.policies]
        self.hits = [0 for _ in policy.policies]
        self.active = self.num_seen = 0

    def touch(self, block: int, place: int, request: int) -> None:
        for order in self.orders:
            order.touch(block)
        for index, directory in enumerate(self.directories):
            if block in directory.used:
                self.hits[index] += 1
            elif len(directory.used) == self.capacity:
                directory.forget(directory.evict())
            directory.touch(block)
        self.num_seen += 1
        if self.num_seen % self.policy.window == 0:
            best = max(self.hits)
            if best > self.hits[self.active] + int(self.policy.margin * self.policy.window):
                self.active = self.hits.index(best)
            self.hits = [0 for _ in self.hits]

    admit = touch

    def evict(self, incoming: int, place: int, request: int) -> int:
        victim = self.orders[self.active].evict()
        for order in self.orders:
            order.forget(victim)
        return victim


@pytest.mark.parametrize(
    "policy",
    [
        Switch(("lru", "lfu"), window=4, margin=0.0),
        Switch(("lfu", "lru"), window=1, margin=0.0),
        Switch(("lru", "lfu"), window=10, margin=0.1),
    ],
)
def test_equals_plain(policy: Switch) -> None:
    check(policy, partial(Plain, policy), seeds=15, num_requests=40)


def test_before_the_first_window_ends_it_is_its_first_member() -> None:
    members = [name for name in REQUEST_POLICIES.names() if REQUEST_POLICIES[name].forget is not None]
    assert {"lru", "lfu", "gdsf", "wtinylfu", "length-aware", "workload-aware"} <= set(members)
    for first in members:
        second = "lru" if first != "lru" else "lfu"
        policy = Switch((first, second))
        for seed in range(6):
            trace = random_log(seed).trace()
            for capacity in CAPACITIES:
                alone = replay(trace, build(REQUEST_POLICIES, Component(first)), capacity, backend="python")
                switched = replay(trace, policy, capacity, backend="python")
                assert switched.hits.tolist() == alone.hits.tolist(), f"{first}, seed {seed}, capacity {capacity}"


def scans_and_loops() -> list[list[int]]:
    """Return accesses that reward frequency (few blocks among scans), then recency (new ones time and again)."""
    scans = [block for step in range(400) for block in (step % 4, step % 4, 1000 + step)]
    phases = [10_000 + step // 20 * 4 + step % 4 for step in range(1200)]
    return [[block] for block in scans + phases]


def test_it_follows_the_better_member() -> None:
    trace = make_trace(scans_and_loops())
    lru, lfu = (replay(trace, build(REQUEST_POLICIES, Component(name)), 6, "object").hits for name in ("lru", "lfu"))
    assert lfu[:1200].sum() > 1.2 * lru[:1200].sum()
    assert lru[1200:].sum() > 1.2 * lfu[1200:].sum()
    switched = replay(trace, Switch(("lru", "lfu"), window=50), 6, "object").hits
    assert switched.sum() > max(lru.sum(), lfu.sum())
    assert switched[:1200].sum() > 0.9 * lfu[:1200].sum()
    assert switched[1200:].sum() > 0.9 * lru[1200:].sum()


@pytest.mark.parametrize(("margin", "changes"), [(0.0, True), (1.0, False)])
def test_changes_are_counted_and_a_margin_keeps_from_them(margin: float, changes: bool) -> None:
    policy = Switch(("lru", "lfu"), window=50, margin=margin)
    trace = make_trace(scans_and_loops())
    kept: list[Any] = []

    class Kept(Switch):
        def state(self, trace: Any, capacity_blocks: int) -> Any:
            kept.append(policy.state(trace, capacity_blocks))
            return kept[-1]

    replay(trace, Kept(("lru", "lfu")), 6, "object", backend="python")
    numbers = kept[-1][2]
    assert (numbers[CHANGES] > 0) == changes
    assert numbers[ACTIVE] in ((0, 1) if changes else (0,))


def test_more_than_two_members() -> None:
    names = ("lru", "lfu", "gdsf", "workload-aware")
    policy = Switch(names, window=7, margin=0.0)
    for seed in range(10):
        trace = random_log(seed, 60).trace()
        optimum = replay(trace, REQUEST_POLICIES["belady"](), 5, "object", backend="python").block_hits
        assert replay(trace, policy, 5, "object", backend="python").block_hits <= optimum


@pytest.mark.parametrize(
    ("members", "problem"),
    [
        ("lru+lru", "needs two different policies or more, got 'lru.lru'"),
        ("lru", "needs two different policies or more, got 'lru'"),
        ("lru+switch", "'switch' is a switch itself"),
        ("lru+belady", "'belady' knows the future"),
        ("ttl+lru", "'ttl' lets blocks expire"),
        ("lru+infinite", "'infinite' never evicts"),
        ("lru+lru2", "unknown policy 'lru2'"),
    ],
)
def test_refusals(members: str, problem: str) -> None:
    with pytest.raises(UsageError, match=problem) as caught:
        recipes.load("simulate-cache", flags={"trace": "-", "policies": [f"switch:{members}"]})
    assert "policies" in caught.value.message
    with pytest.raises(UsageError, match=problem) as caught:
        Switch(tuple(members.split("+")))
    assert "lru" in caught.value.hint


def test_a_recipe_names_it_by_its_members() -> None:
    flags = {"trace": "-", "policies": ["switch:lru+lfu", {"name": "switch", "policies": ["lfu", "gdsf"], "window": 5}]}
    recipe = recipes.load("simulate-cache", flags=flags)
    made = [build(REQUEST_POLICIES, component) for component in recipe.policies]
    assert made == [Switch(("lru", "lfu")), Switch(("lfu", "gdsf"), 5)]
    assert recipe.policies[0].label() == "switch:lru+lfu"
