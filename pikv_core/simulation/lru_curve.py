"""What a study tells of LRU at every capacity: the whole curve as arrays, and points of it for the result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pikv_core.simulation.curve import curve, worthwhile_capacity
from pikv_core.simulation.replay import Semantics, Touch
from pikv_core.simulation.shards import sampled_curve
from pikv_core.simulation.trace import Trace

WORTHWHILE_SHARE = 0.9


@dataclass(frozen=True)
class LRUCurve:
    """LRU's hits at some capacities; lists have one entry for each."""

    capacity_blocks: list[int]
    block_hits: list[int] | None  # None where estimated
    block_hit_ratio: list[float]
    block_hit_ratio_error: list[float] | None  # of an estimate: half the width of the 95 % interval
    token_hit_ratio: list[float] | None  # None where estimated
    worthwhile_capacity_blocks: int | None  # the least with 90 % of the ceiling's hits; None where estimated or no hits
    sampled_blocks: int | None  # that it was estimated from
    warning: str | None


def exact(
    trace: Trace, capacities: list[int], semantics: Semantics, touch: Touch, warm_up: int
) -> tuple[LRUCurve, dict[str, NDArray[Any]]]:
    """Return the curve at `capacities` (blocks), and at all of them by name; see `curve`."""
    whole = curve(trace, touch, semantics, warm_up=warm_up)
    at = np.minimum(capacities, trace.num_blocks)
    points = LRUCurve(
        capacity_blocks=list(capacities),
        block_hits=whole.block_hits[at].tolist(),
        block_hit_ratio=(whole.block_hits[at] / max(1, whole.block_accesses)).tolist(),
        block_hit_ratio_error=None,
        token_hit_ratio=(whole.token_hits[at] / max(1, whole.input_tokens)).tolist(),
        worthwhile_capacity_blocks=worthwhile_capacity(whole, WORTHWHILE_SHARE) if whole.block_hits[-1] else None,
        sampled_blocks=None,
        warning=None,
    )
    every = np.arange(whole.block_hits.size)
    ratio = whole.block_hits / max(1, whole.block_accesses)
    arrays = {"capacity_blocks": every, "block_hits": whole.block_hits, "token_hits": whole.token_hits}
    return points, {**arrays, "block_hit_ratio": ratio}


def estimated(
    trace: Trace, capacities: list[int], semantics: Semantics, rate: float, seed: int
) -> tuple[LRUCurve, dict[str, NDArray[Any]]]:
    """Return the curve at `capacities` from a sample of the blocks, and at all that the sample tells of."""
    found = sampled_curve(trace, rate, seed, semantics)
    points = LRUCurve(
        capacity_blocks=list(capacities),
        block_hits=None,
        block_hit_ratio=np.interp(capacities, found.capacity_blocks, found.block_hit_ratio).tolist(),
        block_hit_ratio_error=np.interp(capacities, found.capacity_blocks, found.block_hit_ratio_error).tolist(),
        token_hit_ratio=None,
        worthwhile_capacity_blocks=None,
        sampled_blocks=found.num_sampled_blocks,
        warning=found.warning or _too_small(capacities, found.least_capacity_blocks),
    )
    names = ("capacity_blocks", "block_hit_ratio", "block_hit_ratio_error")
    return points, {name: getattr(found, name) for name in names}


def _too_small(capacities: list[int], least: int) -> str | None:
    if min(capacities) >= least:
        return None
    return f"caches below {least:,} blocks hold too few sampled blocks for their hits to be told: sample a larger share"
