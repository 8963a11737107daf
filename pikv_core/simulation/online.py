"""Serve requests one at a time under a block policy, as `replay` serves a whole trace: the same loop, the same hits.

What sizes a policy's state, the blocks and requests there will be, is not known here. There is room for twice as many
as there were; when it is used up, a state with more is made by replaying what was served. Keys of `gdsf` with
`attention_tokens` are rounded by the length of the trace, beyond a million accesses; all other hits are equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pikv_core.errors import UsageError
from pikv_core.simulation.metrics import HitRow, hit_row
from pikv_core.simulation.policies.base import RequestPolicy
from pikv_core.simulation.replay import EVICTED, EVICTED_UNUSED, EXPIRED, Replay, Touch, loop_for, touch_order
from pikv_core.simulation.trace import ROOT, Trace

PYTHON_ACCESSES = 20_000  # more at once are worth the loading of a compiled loop
LEAST_ROOM = 64


@dataclass(frozen=True)
class Request:
    """The ids of a prompt's blocks, any of 64 bits, when it came, and its tokens."""

    ids: Sequence[int]
    timestamp_ms: float
    input_tokens: int
    output_tokens: int = 0


class OnlineReplay:
    """Prefix hits and residents of the requests served so far, beginning with `served`."""

    def __init__(
        self,
        policy: RequestPolicy,
        capacity_blocks: int,
        block_tokens: int,
        touch: Touch | None = None,
        served: Sequence[Request] = (),
    ):
        if policy.knows_future:
            raise UsageError(
                f"policy '{policy.name}' knows the requests to come, and here they have not come yet",
                hint="choose another policy; `pikv simulate-cache` replays this one on a log",
            )
        self.policy, self.capacity_blocks, self.block_tokens = policy, capacity_blocks, block_tokens
        self.touch = touch_order(policy, "prefix", touch)
        self._loop = loop_for(policy, "prefix", "python")
        self._refits = any(part.refits for part in policy.parts())
        self._blocks: list[int] = []  # ids in order of first sight
        self._numbers: dict[int, int] = {}  # their places there
        self._ids, self._starts, self._times_ms = np.zeros(0, np.int32), np.zeros(1, np.int64), np.zeros(0, np.float64)
        self._tokens, self._hits = np.zeros((2, 0), np.int64), np.zeros(0, np.int64)
        self._reserve(LEAST_ROOM)
        self._longest, self.num_requests = 0, 0
        self._room: Trace | None = None
        self._resident, self._counters = np.zeros(0, np.uint8), np.zeros(EXPIRED + 1, np.int64)
        for request in served:
            self._take(request)
        if served:
            self._renew()
            self._run(0)

    def serve(self, request: Request) -> int:
        """Serve a request, which comes no earlier than the one before it; return its hits, in blocks."""
        self._take(request)
        if self._has_room():
            self._run(self.num_requests - 1)
        else:
            self._renew()
            self._run(0)
        return int(self._hits[self.num_requests - 1])

    def residents(self) -> set[int]:
        """Return the ids of the blocks that are held now."""
        return {self._blocks[number] for number in np.flatnonzero(self._resident)}

    def row(self, since: int = 0) -> HitRow:
        """Return the row that `simulate-cache` prints of these requests; hits and accesses of those from `since` on."""
        trace, R = self._exact(), self.num_requests
        room = trace.num_blocks if self.policy.unbounded else self.capacity_blocks
        found = Replay(
            policy=self.policy.name,
            capacity_blocks=self.capacity_blocks,
            semantics="prefix",
            touch=self.touch,
            hits=self._hits[:R],
            evictions=int(self._counters[EVICTED]),
            evictions_unused=int(self._counters[EVICTED_UNUSED]),
            expirations=int(self._counters[EXPIRED]),
            requests_larger_than_cache=int((trace.blocks_per_request > room).sum()),
        )
        return hit_row(trace, found, since)

    def _take(self, request: Request) -> None:
        """Write a request down behind the others."""
        R = self.num_requests
        if R == self._times_ms.size:
            self._reserve(2 * R)  # a state holds on to the old arrays, and is renewed since it has no room either
        if R == 0:
            self._first_ms = request.timestamp_ms
        time_ms = request.timestamp_ms - self._first_ms
        assert R == 0 or time_ms >= self._times_ms[R - 1]
        begin, end = int(self._starts[R]), int(self._starts[R]) + len(request.ids)
        if end > self._ids.size:
            self._ids = _longer(self._ids, 2 * end)
        for place, block in enumerate(request.ids, begin):
            if block not in self._numbers:
                self._numbers[block] = len(self._blocks)
                self._blocks.append(block)
            self._ids[place] = self._numbers[block]
        self._starts[R + 1], self._times_ms[R] = end, time_ms
        self._tokens[:, R] = request.input_tokens, request.output_tokens
        self._longest = max(self._longest, len(request.ids))
        self.num_requests = R + 1

    def _has_room(self) -> bool:
        room = self._room
        return (
            room is not None
            and not self._refits
            and len(self._numbers) <= room.num_blocks
            and self.num_requests < room.num_requests  # the last one is never served
            and self._starts[self.num_requests] <= room.ids.size
            and self._longest <= room.longest_request_blocks
        )

    def _reserve(self, num_requests: int) -> None:
        """Give every column of requests a new array of so many."""
        self._starts, self._times_ms = _longer(self._starts, num_requests + 1), _longer(self._times_ms, num_requests)
        self._tokens, self._hits = _longer(self._tokens, num_requests), _longer(self._hits, num_requests)

    def _renew(self) -> None:
        """Make a state with room to grow."""
        self._room = self._exact() if self._refits else self._roomy()
        blocks = self._room.num_blocks
        self._capacity = max(1, blocks if self.policy.unbounded else min(self.capacity_blocks, blocks))
        self._state: Any = self.policy.state(self._room, self._capacity)
        self._resident = np.zeros(blocks, np.uint8)
        self._counters = np.zeros(EXPIRED + 1, np.int64)

    def _exact(self) -> Trace:
        """Return the requests so far as a trace."""
        R = self.num_requests
        ids, starts = self._ids[: self._starts[R]], self._starts[: R + 1]
        return self._trace(ids, starts, self._times_ms[:R], self._tokens[:, :R], len(self._numbers))

    def _roomy(self) -> Trace:
        """Return a trace of room for more requests; its arrays are those that are written to as they come.

        Its last request is never served: it is as long as any may become.
        """
        R, end = self.num_requests, int(self._starts[self.num_requests])
        if 2 * R > self._times_ms.size:
            self._reserve(2 * R)
        self._starts[R + 1 :] = end
        self._starts[-1] = end + max(LEAST_ROOM, 2 * self._longest)
        if self._starts[-1] > self._ids.size:
            self._ids = _longer(self._ids, int(self._starts[-1]))
        num_blocks = max(LEAST_ROOM, 2 * len(self._numbers))
        trace = self._trace(self._ids, self._starts, self._times_ms, self._tokens, num_blocks)
        assert trace.longest_request_blocks >= self._longest  # worked out before the array changes
        return trace

    def _trace(
        self, ids: NDArray[Any], starts: NDArray[Any], times_ms: NDArray[Any], tokens: NDArray[Any], num_blocks: int
    ) -> Trace:
        R = starts.size - 1
        return Trace(
            ids,
            starts,
            times_ms,
            tokens[0],
            tokens[1],
            self.block_tokens,
            num_blocks,
            category=np.zeros(R, np.int16),
            turn=np.zeros(R, np.int32),
            parent=np.full(R, ROOT, np.int64),
        )

    def _run(self, first: int) -> None:
        """Serve what was taken, from request `first` on."""
        last = self.num_requests
        is_long = self._starts[last] - self._starts[first] > PYTHON_ACCESSES
        loop = loop_for(self.policy, "prefix", "numba") if is_long else self._loop
        among = (self._ids.view(np.uint32), self._starts, first, last)
        loop(*among, self._state, self._resident, self._capacity, self.touch == "reverse", self._counters, self._hits)


def _longer(x: NDArray[Any], length: int) -> NDArray[Any]:
    """Return an array of this length in the last dimension that begins with x."""
    grown = np.zeros((*x.shape[:-1], length), x.dtype)
    grown[..., : x.shape[-1]] = x
    return grown
