"""Belady among leaves equals a search over all blocks and all of the future, and keeps prefixes whole."""

from __future__ import annotations

import itertools

from timed_replay import CAPACITIES, Log, check, plain_replay, random_log

from pikv_core.simulation.policies.belady_leaf import BeladyLeaf, parents
from pikv_core.simulation.policies.lru import LRU
from pikv_core.simulation.replay import replay
from pikv_core.simulation.trace import make_trace


class Plain:
    """Look for the victim's next use from the last access to it on, and for its children among all residents."""

    def __init__(self, log: Log, capacity: int) -> None:
        self.starts = [0, *itertools.accumulate(len(request) for request in log.requests)]
        self.flat = [block for request in log.requests for block in request]
        self.parents: dict[int, int | None] = {}
        for request in log.requests:
            for before, block in zip([None, *request], request):
                self.parents.setdefault(block, before)
        self.held: set[int] = set()
        self.last: dict[int, int] = {}  # the farthest access to each block so far

    def touch(self, block: int, place: int, request: int) -> None:
        self.held.add(block)
        self.last[block] = max(self.last.get(block, -1), self.starts[request] + place)

    admit = touch

    def next_use(self, block: int) -> int:
        later = range(self.last[block] + 1, len(self.flat))
        return next((access for access in later if self.flat[access] == block), len(self.flat))

    def evict(self, incoming: int, place: int, request: int) -> int:
        leaves = self.held - {self.parents[block] for block in self.held}
        victim = max(leaves, key=lambda leaf: (self.next_use(leaf), -self.last[leaf]))
        self.held.remove(victim)
        return victim


def test_equals_plain() -> None:
    check(BeladyLeaf(), Plain, num_requests=60)


def test_parents_are_the_blocks_before_where_a_block_is_first_seen() -> None:
    assert parents(make_trace([[], [0, 1, 2], [], [3, 1, 4], [5, 5, 0], []])).tolist() == [-1, 0, 1, -1, 1, -1]
    for seed in range(40):
        log = random_log(seed)
        trace = log.trace()
        plain = Plain(log, 1)
        raw = dict(zip(trace.ids.tolist(), plain.flat)) | {-1: None}
        found = {raw[block]: raw[parent] for block, parent in enumerate(parents(trace).tolist())}
        assert found == plain.parents


def test_no_block_is_held_without_its_prefix() -> None:
    for seed in range(0, 40, 2):
        log = random_log(seed, 60)
        before = {block: earlier for request in log.requests for earlier, block in itertools.pairwise(request)}

        def whole(held: set[int], before: dict[int, int] = before) -> None:
            assert all(before.get(block, block) in held for block in held)

        for capacity in CAPACITIES:
            plain_replay(log, Plain(log, capacity), capacity, "prefix", "reverse", after=whole)


def test_it_has_more_prefix_hits_than_lru() -> None:
    ours = lru = 0
    for seed in range(0, 40, 2):
        trace = random_log(seed, 60).trace()
        for capacity in (2, 5, 8):
            ours += replay(trace, BeladyLeaf(), capacity, backend="python").block_hits
            lru += replay(trace, LRU(), capacity, backend="python").block_hits
    assert ours > 1.1 * lru
