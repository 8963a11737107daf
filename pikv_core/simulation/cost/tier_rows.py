"""What one tier served, read and wrote, and from which prompt on loading from it beats computing."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pikv_core.simulation.cost.hardware import Hardware
from pikv_core.simulation.cost.kv_model import KvModel
from pikv_core.simulation.cost.prefill import compute_s
from pikv_core.simulation.cost.tier_loop import EVICTED, EXPIRED, HITS, USED, USED_TOKENS, WRITTEN
from pikv_core.simulation.cost.tiers import Tier
from pikv_core.simulation.trace import Trace

LONGEST_TOKENS = 10**8  # a break-even beyond is none


@dataclass(frozen=True)
class TierRow:
    """One tier; a block counts as a hit of the highest tier that holds it."""

    tier: str
    policy: str
    capacity_blocks: int | None  # None: unlimited
    capacity_bytes: int | None
    block_hits: int  # leading blocks found here
    block_hit_ratio: float
    blocks_used: int  # of these, not recomputed: loaded, or read in place where nothing has to be loaded
    tokens_used: int
    bytes_read: int
    bytes_written: int  # of blocks that entered
    read_utilisation: float | None  # share of the time between arrivals that reads take; None without a limit
    write_utilisation: float | None  # above 1: more is written than the tier takes, and this replay does not slow down
    evictions: int
    expirations: int
    break_even_tokens: int | None  # shortest prompt of whole blocks that loads no slower than it is computed


def tier_row(
    tier: Tier,
    tally: NDArray[np.int64],
    trace: Trace,
    model: KvModel,
    hardware: Hardware,
    accesses: int,
    span_s: float,
) -> TierRow:
    """Return a tier's row; tally: its columns in tier_loop. accesses: of blocks. span_s: from first to last arrival."""
    block_bytes = model.block_bytes(trace.block_tokens)
    read, written = block_bytes * int(tally[USED]), block_bytes * int(tally[WRITTEN])
    capacity = None if tier.policy.unbounded else tier.capacity_blocks
    return TierRow(
        tier=tier.name,
        policy=tier.label,
        capacity_blocks=capacity,
        capacity_bytes=None if capacity is None else capacity * block_bytes,
        block_hits=int(tally[HITS]),
        block_hit_ratio=int(tally[HITS]) / max(1, accesses),
        blocks_used=int(tally[USED]),
        tokens_used=int(tally[USED_TOKENS]),
        bytes_read=read,
        bytes_written=written,
        read_utilisation=_utilisation(read, tier.read_bytes_per_s, span_s),
        write_utilisation=_utilisation(written, tier.write_bytes_per_s, span_s),
        evictions=int(tally[EVICTED]),
        expirations=int(tally[EXPIRED]),
        break_even_tokens=break_even_tokens(tier, model, hardware, trace.block_tokens),
    )


def break_even_tokens(tier: Tier, model: KvModel, hardware: Hardware, block_tokens: int) -> int | None:
    """Return the shortest prompt of whole blocks that this tier loads no slower than it is computed, None if none.

    What computing takes over what loading takes is convex in the length and at most 0 for none at all: once loading
    is ahead, it stays ahead.
    """

    def is_ahead(num_blocks: int) -> bool:
        load_s = tier.latency_s + num_blocks * model.block_bytes(block_tokens) / tier.read_bytes_per_s
        return load_s <= float(compute_s(model, hardware, num_blocks * block_tokens, 0))

    behind, ahead = 0, 1
    while not is_ahead(ahead):
        behind, ahead = ahead, 2 * ahead
        if ahead * block_tokens > LONGEST_TOKENS:
            return None
    while ahead - behind > 1:
        middle = (behind + ahead) // 2
        behind, ahead = (behind, middle) if is_ahead(middle) else (middle, ahead)
    return ahead * block_tokens


def _utilisation(num_bytes: int, bytes_per_s: float, span_s: float) -> float | None:
    return num_bytes / (bytes_per_s * span_s) if span_s > 0 and math.isfinite(bytes_per_s) else None
