"""Replay a trace under one policy and capacity: lookup, order of touching and accounting.

Prefix hits of a request: the leading run of its blocks that are resident on arrival, before any is touched.
Object hits: each access for itself, resident at that moment. Every accessed block enters the cache; outputs
do not. Blocks of a request larger than the cache push one another out: touched in reverse, its tail leaves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from threading import Lock
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pikv_core.simulation.compiled import compiled
from pikv_core.simulation.policies.base import Functions, RequestPolicy
from pikv_core.simulation.trace import Trace

Semantics = Literal["prefix", "object"]
Touch = Literal["reverse", "forward"]
Backend = Literal["numba", "python"]

SLICE_ACCESSES = 4_000_000  # between two reports of progress
RESIDENT, EVICTED, EVICTED_UNUSED, EXPIRED = range(4)  # a replay's counters
UNUSED, USED = 1, 2  # whether a resident block has been hit since it entered

_loops: dict[tuple[Any, ...], Callable[..., None]] = {}
_making = Lock()  # threads that replay one policy at several capacities share its loop, compiled once


@dataclass(frozen=True)
class Replay:
    """What one replay counted; hits are of blocks."""

    policy: str
    capacity_blocks: int
    semantics: Semantics
    touch: Touch  # the order that was used
    hits: NDArray[np.integer]  # [R]
    evictions: int  # blocks that had to leave, expired ones not among them
    evictions_unused: int  # of these, blocks that nothing hit since they had entered
    expirations: int
    requests_larger_than_cache: int  # they evict blocks of their own

    @property
    def block_hits(self) -> int:
        return int(self.hits.sum())


def replay(
    trace: Trace,
    policy: RequestPolicy,
    capacity_blocks: int,
    semantics: Semantics = "prefix",
    touch: Touch | None = None,
    backend: Backend = "numba",
    progress: Callable[[int, int], None] | None = None,
) -> Replay:
    """Replay the whole trace from an empty cache; touch: see touch_order, whose answer the result carries.

    progress: called now and then with the requests done and all of them.
    """
    order = touch_order(policy, semantics, touch)
    room = trace.num_blocks if policy.unbounded else capacity_blocks
    capacity = max(1, min(room, trace.num_blocks))
    state = policy.state(trace, capacity)
    resident = np.zeros(trace.num_blocks, np.uint8)
    counters = np.zeros(EXPIRED + 1, np.int64)
    loop = loop_for(policy, semantics, backend)
    hits: NDArray[Any]
    if semantics == "prefix":
        hits = np.zeros(trace.num_requests, np.int64)
        how: Any = order == "reverse"
    else:
        hits = np.zeros(trace.ids.size, np.uint8)
        how = single_accesses(trace)
    ids = trace.ids.view(np.uint32)  # no index below zero, so none that compiled code has to wrap around
    for first, last in slices(trace):
        loop(ids, trace.starts, first, last, state, resident, capacity, how, counters, hits)
        if progress is not None:
            progress(last, trace.num_requests)
    return Replay(
        policy=policy.name,
        capacity_blocks=capacity_blocks,
        semantics=semantics,
        touch=order,
        hits=hits if semantics == "prefix" else _by_request(hits, trace),
        evictions=int(counters[EVICTED]),
        evictions_unused=int(counters[EVICTED_UNUSED]),
        expirations=int(counters[EXPIRED]),
        requests_larger_than_cache=_larger_than(room, trace),
    )


def touch_order(policy: RequestPolicy, semantics: Semantics, asked: Touch | None) -> Touch:
    """Return the order used: forward for object hits or as the policy needs, else as asked or reverse."""
    if semantics == "object" or policy.always_forward:
        return "forward"
    return asked or "reverse"


def slices(trace: Trace, cut: int = 0) -> list[tuple[int, int]]:
    """Cut the requests into stretches of about SLICE_ACCESSES accesses, and before the request `cut`."""
    wanted = np.arange(SLICE_ACCESSES, trace.ids.size, SLICE_ACCESSES)
    cuts = np.unique(np.concatenate([[0, cut], np.searchsorted(trace.starts, wanted), [trace.num_requests]]))
    return [(int(first), int(last)) for first, last in pairwise(cuts)]


def _by_request(hit: NDArray[Any], trace: Trace) -> NDArray[np.integer]:
    """Return the hits of each request from those of each access."""
    if single_accesses(trace):
        return hit
    ends = np.concatenate([[0], np.cumsum(hit, dtype=np.int64)])
    return ends[trace.starts[1:]] - ends[trace.starts[:-1]]


def _larger_than(room: int, trace: Trace) -> int:
    """Count the requests of more blocks than there is room for."""
    if trace.longest_request_blocks <= room:
        return 0
    return int((trace.blocks_per_request > room).sum())


def single_accesses(trace: Trace) -> bool:
    """Tell whether every request is a single access."""
    return trace.ids.size == trace.num_requests and trace.longest_request_blocks == 1


def loop_for(policy: RequestPolicy, semantics: Semantics, backend: Backend) -> Callable[..., None]:
    """Return the loop over requests with the policy's functions bound, compiled once or as it stands."""
    make = _prefix_loop if semantics == "prefix" else _object_loop
    if backend == "python":
        return make(policy.functions())
    key = (*policy.parts(), semantics)
    with _making:
        if key not in _loops:
            name = "_".join([semantics, *(part.name for part in policy.parts())])
            _loops[key] = compiled(make(policy.functions()), f"replay_{name}", *policy.parts())
        return _loops[key]


def _prefix_loop(functions: Functions) -> Callable[..., None]:
    """Return the loop over requests `first` to `last` with the policy's functions bound; hits [R]."""
    note_touch, admit, evict, expire = functions

    def loop(
        ids: Any,
        starts: Any,
        first: int,
        last: int,
        state: Any,
        resident: Any,
        capacity: int,
        reverse: bool,
        counters: Any,
        hits: Any,
    ) -> None:
        num_resident, evictions, unused = counters[RESIDENT], counters[EVICTED], counters[EVICTED_UNUSED]
        for request in range(first, last):
            begin, end = starts[request], starts[request + 1]
            gone = expire(state, request)
            while gone >= 0:
                resident[gone] = 0
                num_resident -= 1
                counters[EXPIRED] += 1
                gone = expire(state, request)
            num_hits = 0
            while begin + num_hits < end and resident[ids[begin + num_hits]]:
                num_hits += 1
            hits[request] = num_hits
            for step in range(end - begin):
                access = end - 1 - step if reverse else begin + step
                block: Any = np.int64(ids[access])
                if resident[block]:
                    resident[block] = USED
                    note_touch(state, block, access, request)
                    continue
                if num_resident == capacity:
                    victim = evict(state, block, access, request)
                    unused += resident[victim] == UNUSED
                    resident[victim] = 0
                    evictions += 1
                else:
                    num_resident += 1
                resident[block] = UNUSED
                admit(state, block, access, request)
        counters[RESIDENT], counters[EVICTED], counters[EVICTED_UNUSED] = num_resident, evictions, unused

    return loop


def _object_loop(functions: Functions) -> Callable[..., None]:
    """Return the loop over the accesses of requests `first` to `last`; hits [A], 1 for a hit.

    single: every request has one access.
    """
    note_touch, admit, evict, expire = functions

    def loop(
        ids: Any,
        starts: Any,
        first: int,
        last: int,
        state: Any,
        resident: Any,
        capacity: int,
        single: bool,
        counters: Any,
        hits: Any,
    ) -> None:
        num_resident, evictions, unused = counters[RESIDENT], counters[EVICTED], counters[EVICTED_UNUSED]
        request = first - 1
        end = starts[first]
        for access in range(starts[first], starts[last]):
            arrives = single
            if single:
                request = access
            else:
                while access == end:
                    arrives = True
                    request += 1
                    end = starts[request + 1]
            if arrives:
                gone = expire(state, request)
                while gone >= 0:
                    resident[gone] = 0
                    num_resident -= 1
                    counters[EXPIRED] += 1
                    gone = expire(state, request)
            block: Any = np.int64(ids[access])
            if resident[block]:
                resident[block] = USED
                hits[access] = 1
                note_touch(state, block, access, request)
                continue
            if num_resident == capacity:
                victim = evict(state, block, access, request)
                unused += resident[victim] == UNUSED
                resident[victim] = 0
                evictions += 1
            else:
                num_resident += 1
            resident[block] = UNUSED
            admit(state, block, access, request)
        counters[RESIDENT], counters[EVICTED], counters[EVICTED_UNUSED] = num_resident, evictions, unused

    return loop
