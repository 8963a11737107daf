"""The object hits of LRU at every capacity, estimated from a sample of the blocks.

SHARDS with a fixed rate (Waldspurger et al., FAST 2015): blocks are sampled by their hash, so that all accesses of a
block are in the sample or none is; depths among the sampled blocks are scaled up. SHARDS-adj: the accesses that the
sample holds too few or too many of, most of them of a few hot blocks, are set right at the smallest depth. The error
is measured: the sample falls into 16 disjoint groups of blocks, and the curve is estimated without each (jackknife).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pikv_core.errors import UsageError
from pikv_core.simulation.curve import curve
from pikv_core.simulation.replay import Backend, Semantics
from pikv_core.simulation.trace import ROOT, Trace, dense

GROUPS = 16
STUDENT_95 = 2.131  # two-sided quantile of Student's t with GROUPS - 1 degrees of freedom
FEWEST_SAMPLED = 1000  # blocks or accesses
FEWEST_HELD = 10  # sampled blocks that a cache should hold for its hits to be told from the sample
STRETCH = 1 << 20  # blocks or accesses in the works at a time


@dataclass(frozen=True)
class SampledCurve:
    """Estimated object hits of LRU, touched forward; the arrays have one entry per capacity, growing from 0 blocks."""

    capacity_blocks: NDArray[np.int64]
    block_hit_ratio: NDArray[np.float64]
    block_hit_ratio_error: NDArray[np.float64]  # half the width of the 95 % interval
    least_capacity_blocks: (
        int  # smaller caches hold too few sampled blocks: neither estimate nor error is to be trusted
    )
    rate: float
    seed: int
    num_sampled_blocks: int
    num_sampled_accesses: int
    warning: str | None


def sampled_curve(
    trace: Trace,
    rate: float,
    seed: int = 0,
    semantics: Semantics = "object",
    backend: Backend = "numba",
    progress: Callable[[int, int], None] | None = None,
) -> SampledCurve:
    """Estimate the curve from about `rate` of the blocks; raise UsageError for prefix hits.

    At rate 1 it is the exact curve. progress: called with the curves done, of the sample and of its parts, and all.
    """
    if semantics == "prefix":
        raise UsageError(
            "a sample of the blocks has no prefixes, so that it tells nothing of prefix hits",
            hint="leave the sample out: the exact curve takes one pass for every capacity",
        )
    if not 0 < rate <= 1:
        raise UsageError(f"sample: expected a share above 0 and up to 1, got '{rate}'", hint="0.01 is often enough")
    sample, groups = _sample(trace, rate, seed)
    all_accesses = trace.ids.size
    capacity, ratio = _estimate(sample, rate, all_accesses, backend)
    partial = np.zeros((GROUPS, ratio.size))
    for group in range(GROUPS):
        if progress is not None:
            progress(group + 1, GROUPS + 1)
        rest = _objects(sample.ids[groups != group], sample.num_blocks)
        partial[group] = np.interp(capacity, *_estimate(rest, rate * (GROUPS - 1) / GROUPS, all_accesses, backend))
    if progress is not None:
        progress(GROUPS + 1, GROUPS + 1)
    variance = (GROUPS - 1) * partial.var(axis=0) * (1 - rate)  # of a finite population: all of it has no error
    return SampledCurve(
        capacity_blocks=np.ceil(capacity).astype(np.int64),
        block_hit_ratio=ratio,
        block_hit_ratio_error=STUDENT_95 * np.sqrt(variance),
        least_capacity_blocks=0 if rate == 1 else math.ceil(FEWEST_HELD / rate),
        rate=rate,
        seed=seed,
        num_sampled_blocks=sample.num_blocks,
        num_sampled_accesses=sample.ids.size,
        warning=_warning(sample.num_blocks, sample.ids.size),
    )


def _estimate(
    sample: Trace, rate: float, all_accesses: int, backend: Backend
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return capacities, in blocks of the whole trace, and hit ratios.

    A block at depth d of the whole trace is, in the sample, below a share of the others: 1 + (d - 1) × rate.
    """
    found = curve(sample, semantics="object", backend=backend)
    depths = np.arange(found.block_hits.size)
    expected = rate * all_accesses
    hits = found.block_hits + (expected - sample.ids.size)
    hits[0] = 0
    return np.where(depths > 0, (depths - 1) / rate + 1, 0.0), np.clip(hits / max(1.0, expected), 0, 1)


def _objects(ids: NDArray[np.int32], num_blocks: int) -> Trace:
    """Return a trace with one access per request."""
    count = ids.size
    none = np.zeros(count, np.int64)
    return Trace(
        ids,
        np.arange(count + 1),
        timestamps_ms=np.broadcast_to(np.float64(0), count),
        input_tokens=none,
        output_tokens=none,
        block_tokens=1,
        num_blocks=num_blocks,
        category=np.broadcast_to(np.int16(0), count),
        turn=np.broadcast_to(np.int32(0), count),
        parent=np.broadcast_to(np.int64(ROOT), count),
        is_objects=True,
    )


def _sample(trace: Trace, rate: float, seed: int) -> tuple[Trace, NDArray[np.int8]]:
    """Return the accesses to a share of the blocks, and the group, of GROUPS, that the block of each is in."""
    group_of_block = np.full(trace.num_blocks, -1, np.int8)
    for first in range(0, trace.num_blocks, STRETCH):
        share = _hashed(first, min(trace.num_blocks, first + STRETCH), seed)
        group_of_block[first : first + STRETCH] = np.where(share < rate, (share / rate * GROUPS).astype(np.int8), -1)
    is_sampled = group_of_block >= 0
    kept = []
    for first in range(0, trace.ids.size, STRETCH):
        ids = trace.ids[first : first + STRETCH]
        kept.append(ids[is_sampled.take(ids)])
    blocks = np.concatenate([np.zeros(0, np.int32), *kept])
    return _objects(*dense(blocks)), group_of_block[blocks]


def _hashed(first: int, end: int, seed: int) -> NDArray[np.float64]:
    """Return a number from 0 to below 1 for each block from `first` on (splitmix64 of seed and block)."""
    mixed = np.arange(first, end, dtype=np.uint64) + np.uint64((seed & 0xFFFFFFFF) << 32)
    mixed = (mixed + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((mixed ^ (mixed >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) / 2.0**53


def _warning(num_blocks: int, num_accesses: int) -> str | None:
    if min(num_blocks, num_accesses) >= FEWEST_SAMPLED:
        return None
    return (
        f"the sample has {num_blocks:,} blocks and {num_accesses:,} accesses; below {FEWEST_SAMPLED:,} of either "
        "the curve is a guess: sample a larger share"
    )
