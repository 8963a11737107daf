"""What a replay's hits amount to: ratios over blocks, tokens and requests."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pikv_core.simulation.replay import Replay, Touch
from pikv_core.simulation.trace import Trace


@dataclass(frozen=True)
class HitRow:
    """One policy at one capacity; hits and accesses of the requests after the warm-up, the rest of the whole trace."""

    policy: str
    touch: Touch
    capacity_blocks: int
    block_hits: int
    block_accesses: int
    block_hit_ratio: float
    token_hit_ratio: float
    request_hit_ratio: float  # the mean over requests that have blocks
    evictions: int  # blocks
    evictions_unused: int  # of these, blocks that nothing hit
    expirations: int
    requests_larger_than_cache: int


def hit_row(trace: Trace, replay: Replay, warm_up: int = 0) -> HitRow:
    """Return the row of a replay; warm_up: requests that are replayed but not counted."""
    hits, sizes = replay.hits[warm_up:], trace.blocks_per_request[warm_up:]
    accesses = int(sizes.sum())
    has_blocks = sizes > 0
    return HitRow(
        policy=replay.policy,
        touch=replay.touch,
        capacity_blocks=replay.capacity_blocks,
        block_hits=int(hits.sum()),
        block_accesses=accesses,
        block_hit_ratio=int(hits.sum()) / max(1, accesses),
        token_hit_ratio=token_hit_ratio(trace, replay.hits, warm_up),
        request_hit_ratio=float((hits[has_blocks] / sizes[has_blocks]).mean()) if has_blocks.any() else 0.0,
        evictions=replay.evictions,
        evictions_unused=replay.evictions_unused,
        expirations=replay.expirations,
        requests_larger_than_cache=replay.requests_larger_than_cache,
    )


def hit_tokens(trace: Trace, hits: NDArray[np.integer]) -> NDArray[np.int64]:
    """Return the input tokens in hit blocks [R], at most the prompt; hits: blocks per request [R]."""
    return np.minimum(trace.block_tokens * hits.astype(np.int64), trace.input_tokens)


def token_hit_ratio(trace: Trace, hits: NDArray[np.integer], warm_up: int = 0) -> float:
    """Return the share of input tokens in hit blocks; hits: blocks per request [R]."""
    tokens = hit_tokens(trace, hits)[warm_up:].sum()
    return float(tokens / max(1, trace.input_tokens[warm_up:].sum()))
