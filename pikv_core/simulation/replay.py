"""Replay a trace under one policy and capacity: lookup, order of touching and accounting.

Prefix hits of a request: the leading run of its blocks that are resident on arrival, before any is touched.
Object hits: each access for itself, resident at that moment. Every accessed block enters the cache; outputs
do not. Blocks of a request larger than the cache push one another out: touched in reverse, its tail leaves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pikv_core.simulation.compiled import compiled
from pikv_core.simulation.policies.base import RequestPolicy
from pikv_core.simulation.trace import Trace

Semantics = Literal["prefix", "object"]
Touch = Literal["reverse", "forward"]
Backend = Literal["numba", "python"]


@dataclass(frozen=True)
class ReplayResult:
    policy: str
    capacity_blocks: int
    semantics: Semantics
    touch: Touch  # the order that was used
    block_hits: int
    block_accesses: int
    block_hit_ratio: float
    token_hit_ratio: float  # sum of min(block_tokens * hits, input tokens) over the sum of input tokens
    evictions: int  # blocks
    requests_larger_than_cache: int  # they evict blocks of their own


def replay(
    trace: Trace,
    policy: RequestPolicy,
    capacity_blocks: int,
    semantics: Semantics = "prefix",
    touch: Touch | None = None,
    backend: Backend = "numba",
) -> ReplayResult:
    """Replay the whole trace from an empty cache; touch: see touch_order, whose answer the result carries."""
    order = touch_order(policy, semantics, touch)
    capacity = min(capacity_blocks, trace.num_blocks)
    hits = np.zeros(trace.num_requests, np.int64)
    loop = _compiled_loop(type(policy)) if backend == "numba" else _loop(type(policy))
    evictions = loop(
        trace.ids,
        trace.starts,
        policy.state(trace, capacity),
        np.zeros(trace.num_blocks, np.bool_),
        capacity,
        semantics == "prefix",
        order == "reverse",
        hits,
    )
    block_hits = int(hits.sum())
    return ReplayResult(
        policy=policy.name,
        capacity_blocks=capacity_blocks,
        semantics=semantics,
        touch=order,
        block_hits=block_hits,
        block_accesses=trace.ids.size,
        block_hit_ratio=block_hits / max(1, trace.ids.size),
        token_hit_ratio=token_hit_ratio(trace, hits),
        evictions=int(evictions),
        requests_larger_than_cache=int((trace.blocks_per_request > capacity_blocks).sum()),
    )


def touch_order(policy: RequestPolicy, semantics: Semantics, asked: Touch | None) -> Touch:
    """Return the order used: forward for object hits or as the policy needs, else as asked or reverse."""
    if semantics == "object" or policy.always_forward:
        return "forward"
    return asked or "reverse"


def token_hit_ratio(trace: Trace, hits: NDArray[np.int64]) -> float:
    """Return the share of input tokens in hit blocks; hits: blocks per request [R]."""
    tokens = np.minimum(trace.block_tokens * hits, trace.input_tokens)
    return float(tokens.sum() / max(1, trace.input_tokens.sum()))


@cache
def _compiled_loop(policy: type[RequestPolicy]) -> Callable[..., int]:
    return compiled(_loop(policy), f"replay_{policy.name}", policy)


def _loop(policy: type[RequestPolicy]) -> Callable[..., int]:
    """Return the loop over requests with the policy's functions bound."""
    note_touch, admit, evict = policy.touch, policy.admit, policy.evict

    def loop(
        ids: Any,
        starts: Any,
        state: Any,
        resident: Any,
        capacity: int,
        prefix: bool,
        reverse: bool,
        hits: Any,
    ) -> int:
        num_resident = 0
        evictions = 0
        for request in range(starts.size - 1):
            first, end = starts[request], starts[request + 1]
            num_hits = 0
            if prefix:
                while first + num_hits < end and resident[ids[first + num_hits]]:
                    num_hits += 1
            for step in range(end - first):
                access = end - 1 - step if reverse else first + step
                block = ids[access]
                if resident[block]:
                    if not prefix:
                        num_hits += 1
                    note_touch(state, block, access)
                    continue
                if num_resident == capacity:
                    resident[evict(state, block, access)] = False
                    evictions += 1
                else:
                    num_resident += 1
                resident[block] = True
                admit(state, block, access)
            hits[request] = num_hits
        return evictions

    return loop
