"""What holds for every block policy: the loop can trust its victims, and its twin, bounds and declarations are true."""

from __future__ import annotations

import dataclasses
import itertools
import random

import pytest
from plain_replay import WAYS, random_requests

from pikv_core.simulation.ceiling import ceiling_hits
from pikv_core.simulation.policies import REQUEST_POLICIES
from pikv_core.simulation.policies.base import RequestPolicy
from pikv_core.simulation.replay import Semantics, Touch, replay
from pikv_core.simulation.trace import Trace, make_trace


def member(name: str) -> RequestPolicy:
    """Build a policy with its default options, one that lists others of two."""
    made = REQUEST_POLICIES[name]
    listed = getattr(made, "listed", None)
    return made(**{listed: ("lru", "lfu")}) if listed else made()


def make(seed: int, requests: list[list[int]] | None = None) -> Trace:
    """Return a trace of random requests (even seeds: ids name their prefix) with pauses and categories."""
    random_ = random.Random(seed)
    requests = random_requests(seed) if requests is None else requests
    times = itertools.accumulate(random_.choice((0.0, 1.0, 2_000.0, 200_000.0)) for _ in requests)
    categories = [random_.choice("ab") for _ in requests]
    return make_trace(requests, timestamps_ms=list(times), categories=categories)


class Driven:
    """A cache under a policy's uncompiled functions; every victim is checked to be resident."""

    def __init__(self, policy: RequestPolicy, trace: Trace, capacity: int):
        self.functions, self.forget = policy.functions(), policy.forget
        self.trace = trace
        self.capacity = trace.num_blocks if policy.unbounded else min(capacity, trace.num_blocks)
        self.state = policy.state(trace, self.capacity)
        self.resident: set[int] = set()

    def serve(self, request: int, reverse: bool, chance: random.Random | None = None) -> None:
        """Touch a request's blocks; chance: forget a random block, as often as not, where one has to be evicted."""
        while (gone := int(self.functions.expire(self.state, request))) >= 0:
            self.resident.remove(gone)
        accesses = range(*self.trace.starts[request : request + 2].tolist())
        for access in reversed(accesses) if reverse else accesses:
            block = int(self.trace.ids[access])
            if block in self.resident:
                self.functions.touch(self.state, block, access, request)
                continue
            if len(self.resident) == self.capacity:
                if chance is not None and chance.random() < 0.5:
                    victim = chance.choice(sorted(self.resident))
                    self.forget(self.state, victim)
                else:
                    victim = int(self.functions.evict(self.state, block, access, request))
                self.resident.remove(victim)
            self.resident.add(block)
            self.functions.admit(self.state, block, access, request)


def assert_twin_equals_compiled(policy: str, semantics: Semantics, seed: int) -> None:
    trace = make(seed)
    capacity = (1, 2, 3, 5, 8, 13, 30, 1000)[seed // 2 % 8]
    touch: Touch = "forward" if seed % 5 < 2 else "reverse"
    compiled = replay(trace, member(policy), capacity, semantics, touch, backend="numba")
    twin = replay(trace, member(policy), capacity, semantics, touch, backend="python")
    assert compiled.hits.tolist() == twin.hits.tolist(), f"seed {seed}, capacity {capacity}, {touch}"
    assert dataclasses.replace(compiled, hits=twin.hits) == twin, f"seed {seed}, capacity {capacity}, {touch}"


@pytest.mark.parametrize("policy", REQUEST_POLICIES.names())
@pytest.mark.parametrize("semantics", ["prefix", "object"])
def test_twin_equals_compiled(policy: str, semantics: Semantics) -> None:
    for seed in range(40):
        assert_twin_equals_compiled(policy, semantics, seed)


@pytest.mark.slow
@pytest.mark.parametrize("policy", REQUEST_POLICIES.names())
def test_twin_equals_compiled_on_a_thousand_traces(policy: str) -> None:
    for seed in range(40, 1040):
        assert_twin_equals_compiled(policy, "prefix" if seed % 3 else "object", seed)


@pytest.mark.parametrize("policy", REQUEST_POLICIES.names())
def test_victims_are_resident(policy: str) -> None:
    for seed in range(20):
        trace = make(seed)
        for capacity in (1, 2, 7, 20):
            driven = Driven(member(policy), trace, capacity)
            for request in range(trace.num_requests):
                driven.serve(request, reverse=seed % 4 < 2)


@pytest.mark.parametrize("policy", REQUEST_POLICIES.names())
def test_victims_are_resident_where_others_choose_some(policy: str) -> None:
    if member(policy).forget is None:
        pytest.skip(f"{policy} has no place in a switch")
    for seed in range(40):
        trace = make(seed)
        chance = random.Random(seed)
        for capacity in (1, 2, 7, 20):
            driven = Driven(member(policy), trace, capacity)
            for request in range(trace.num_requests):
                driven.serve(request, reverse=seed % 4 < 2, chance=chance)


@pytest.mark.parametrize("policy", REQUEST_POLICIES.names())
def test_what_leaves_and_what_stays_is_what_came(policy: str) -> None:
    for seed in range(40):
        trace = make(seed)
        for capacity in (1, 3, 7, 20):
            found = replay(trace, member(policy), capacity, "object")
            stays = trace.ids.size - found.block_hits - found.evictions - found.expirations
            assert 0 <= stays <= trace.num_blocks
            assert member(policy).unbounded or stays <= capacity
            assert not found.evictions or found.expirations or stays == capacity
            assert 0 <= found.evictions_unused <= found.evictions
            assert member(policy).expires or not found.expirations


@pytest.mark.parametrize("policy", REQUEST_POLICIES.names())
@pytest.mark.parametrize(("semantics", "touch"), WAYS)
def test_hits_end_at_the_ceiling(policy: str, semantics: Semantics, touch: Touch) -> None:
    for seed in range(20):
        trace = make(seed)
        ceiling = ceiling_hits(trace, semantics)
        for capacity in (1, 4, 9, trace.num_blocks - 1):
            assert replay(trace, member(policy), capacity, semantics, touch).block_hits <= ceiling
        if not member(policy).expires:
            assert replay(trace, member(policy), trace.num_blocks, semantics, touch).block_hits == ceiling


@pytest.mark.parametrize("policy", REQUEST_POLICIES.names())
def test_no_policy_has_more_object_hits_than_belady(policy: str) -> None:
    if member(policy).unbounded:
        pytest.skip(f"{policy} has no capacity")
    for seed in range(40):
        trace = make(seed)
        for capacity in (1, 2, 3, 5, 8, 13, 20):
            optimum = replay(trace, member("belady"), capacity, "object").block_hits
            assert replay(trace, member(policy), capacity, "object").block_hits <= optimum
            # touched forward, the leading run of resident blocks is hit by each access too
            assert replay(trace, member(policy), capacity, "prefix", "forward").block_hits <= optimum


@pytest.mark.parametrize("policy", REQUEST_POLICIES.names())
def test_leaf_first_policies_never_hold_a_block_without_its_prefix(policy: str) -> None:
    if not member(policy).leaf_first:
        pytest.skip(f"{policy} does not say that it is leaf-first")
    for seed in range(0, 120, 2):
        trace = make(seed)
        prompts = [trace.ids[begin:end].tolist() for begin, end in itertools.pairwise(trace.starts.tolist())]
        before = {block: earlier for prompt in prompts for earlier, block in itertools.pairwise(prompt)}
        for capacity in (1, 2, 4, 7, 12, 20):
            driven = Driven(member(policy), trace, capacity)
            for request in range(trace.num_requests):
                driven.serve(request, reverse=not member(policy).always_forward)
                assert all(before.get(block, block) in driven.resident for block in driven.resident)
