"""Why a cache hits as it does: how far apart accesses to a block are, and which requests have the hits."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pikv_core.simulation.compiled import compiled
from pikv_core.simulation.curve import curve
from pikv_core.simulation.replay import Backend
from pikv_core.simulation.trace import Trace

TIME_BINS = 60
TURNS = 100  # with rows of their own; later ones share a row
LEAST_EXPONENT, MOST_EXPONENT = -9, 64  # of reuse times: bins from 2^-10 ms, about a microsecond, to 2^64 ms


@dataclass(frozen=True)
class Histogram:
    """Accesses by value: counts[i] have edges[i] <= value < edges[i + 1]; the edges are powers of two."""

    edges: list[float]  # [N + 1], none without accesses
    counts: list[int]  # [N]


@dataclass(frozen=True)
class Reuse:
    """How far apart two accesses to the same block are; a property of the trace alone.

    The distance of an access counts the distinct blocks from the last access to its block on, itself included: the
    least capacity at which an LRU cache still holds it.
    """

    accesses: int
    first_accesses: int  # of a block, so without a distance
    blocks_never_reused_share: float  # of the unique blocks, those with a single access
    distances_blocks: Histogram
    times_ms: Histogram
    at_same_time: int  # accesses less than 2^-10 ms after the last, not among times_ms


@dataclass(frozen=True)
class Hits:
    """The hits of some requests; hits and accesses are of blocks."""

    name: str  # of a category; of a turn its number, `100+` for all later ones
    requests: int
    accesses: int
    hits: int
    hit_ratio: float | None  # None without accesses


@dataclass(frozen=True)
class HitsOverTime:
    """Hits in equal stretches of the trace's time, as columns [N]; one stretch where all arrive at once."""

    begins_s: list[float]
    bin_s: float
    requests: list[int]
    accesses: list[int]
    hits: list[int]
    hit_ratios: list[float | None]


@dataclass(frozen=True)
class Diagnostics:
    """What one replay's hits are made of, and the reuse they come from."""

    reuse: Reuse
    by_category: list[Hits]  # most accesses first
    by_turn: list[Hits]
    over_time: HitsOverTime


def diagnose(trace: Trace, hits: NDArray[np.integer], backend: Backend = "numba") -> Diagnostics:
    """Return the diagnostics of a replay; hits: blocks per request [R]."""
    return Diagnostics(
        reuse=reuse(trace, backend),
        by_category=hits_by_category(trace, hits),
        by_turn=hits_by_turn(trace, hits),
        over_time=hits_over_time(trace, hits),
    )


def reuse(trace: Trace, backend: Backend = "numba") -> Reuse:
    """Return how far apart, in blocks and in time, accesses to the same block are."""
    last_ms = np.full(trace.num_blocks, -1.0)
    reused = np.zeros(trace.num_blocks, np.uint8)
    counts = np.zeros(MOST_EXPONENT - LEAST_EXPONENT + 2, np.int64)
    count = _compiled_reuse_times() if backend == "numba" else _reuse_times
    count(trace.ids, trace.starts, trace.timestamps_ms, last_ms, reused, counts)
    return Reuse(
        accesses=trace.ids.size,
        first_accesses=trace.num_blocks,
        blocks_never_reused_share=(trace.num_blocks - int(reused.sum())) / max(1, trace.num_blocks),
        distances_blocks=_distances(trace, backend),
        times_ms=_trimmed(np.exp2(np.arange(LEAST_EXPONENT - 1, MOST_EXPONENT + 1, dtype=np.float64)), counts[1:]),
        at_same_time=int(counts[0]),
    )


def _distances(trace: Trace, backend: Backend) -> Histogram:
    """Take the histogram from the curve of object hits: a distance is the capacity from which on the access hits."""
    if not trace.ids.size:
        return Histogram([], [])
    hits = curve(trace, semantics="object", backend=backend).block_hits
    edges = 2 ** np.arange(trace.num_blocks.bit_length() + 1)
    return _trimmed(edges.astype(np.float64), np.diff(hits[np.minimum(edges - 1, trace.num_blocks)]))


def _trimmed(edges: NDArray[np.float64], counts: NDArray[np.int64]) -> Histogram:
    """Drop the empty bins at both ends."""
    (filled,) = np.nonzero(counts)
    if not filled.size:
        return Histogram([], [])
    first, end = int(filled[0]), int(filled[-1]) + 1
    return Histogram(edges[first : end + 1].tolist(), counts[first:end].tolist())


@cache
def _compiled_reuse_times() -> Callable[..., None]:
    return compiled(_reuse_times, "reuse_times")


def _reuse_times(ids: Any, starts: Any, timestamps_ms: Any, last_ms: Any, reused: Any, counts: Any) -> None:
    """Count the reuse times below 2^-10 ms in counts[0], those from 2^(e - 1) to 2^e in counts[e - LEAST_EXPONENT + 1].

    last_ms: when each block was accessed last, negative for never; reused: 1 for blocks accessed again.
    """
    for request in range(starts.size - 1):
        now = timestamps_ms[request]
        for access in range(starts[request], starts[request + 1]):
            block = ids[access]
            if last_ms[block] >= 0:
                reused[block] = 1
                exponent = math.frexp(now - last_ms[block])[1]
                is_same_time = now - last_ms[block] < 2.0 ** (LEAST_EXPONENT - 1)
                counts[0 if is_same_time else min(exponent, MOST_EXPONENT) - LEAST_EXPONENT + 1] += 1
            last_ms[block] = now


def hits_by_category(trace: Trace, hits: NDArray[np.integer], warm_up: int = 0) -> list[Hits]:
    """Return the hits of each category that has requests, most accesses first; hits: blocks per request [R].

    warm_up: requests that are not counted.
    """
    rows = _grouped(trace, hits, trace.category, trace.categories, warm_up)
    return sorted(rows, key=lambda row: -row.accesses)


def hits_by_turn(trace: Trace, hits: NDArray[np.integer], warm_up: int = 0) -> list[Hits]:
    """Return the hits by turn of the conversation; hits: blocks per request [R]; warm_up: those not counted."""
    names = [*(str(turn) for turn in range(TURNS)), f"{TURNS}+"]
    return _grouped(trace, hits, np.clip(trace.turn, 0, TURNS), names, warm_up)


def _grouped(
    trace: Trace, hits: NDArray[np.integer], group: NDArray[np.integer], names: Sequence[str], warm_up: int
) -> list[Hits]:
    """Return a row for each group [R], an index into names, that has requests after the warm-up."""
    rows = zip(names, *_sums(trace, hits, group, len(names), warm_up), strict=True)
    return [Hits(*row, hit_ratio=_ratio(row[3], row[2])) for row in rows if row[1]]


def hits_over_time(trace: Trace, hits: NDArray[np.integer]) -> HitsOverTime:
    """Return the hits in TIME_BINS equal stretches of time; hits: blocks per request [R]."""
    span_ms = float(trace.timestamps_ms.max(initial=0.0))
    num_bins = TIME_BINS if span_ms > 0 else 1
    place = np.zeros(trace.num_requests, np.int64)
    if span_ms > 0:
        place = np.minimum((trace.timestamps_ms / span_ms * num_bins).astype(np.int64), num_bins - 1)
    requests, accesses, num_hits = _sums(trace, hits, place, num_bins)
    return HitsOverTime(
        begins_s=[span_ms / 1000 * place / num_bins for place in range(num_bins)],
        bin_s=span_ms / 1000 / num_bins,
        requests=requests,
        accesses=accesses,
        hits=num_hits,
        hit_ratios=[_ratio(*pair) for pair in zip(num_hits, accesses, strict=True)],
    )


def _sums(
    trace: Trace, hits: NDArray[np.integer], group: NDArray[np.integer], num_groups: int, warm_up: int = 0
) -> tuple[list[int], list[int], list[int]]:
    """Return requests, accesses and hits by group."""
    counted = group[warm_up:]
    requests = np.bincount(counted, minlength=num_groups)
    accesses = np.bincount(counted, trace.blocks_per_request[warm_up:], num_groups).astype(np.int64)
    num_hits = np.bincount(counted, hits[warm_up:], num_groups).astype(np.int64)
    return requests.tolist(), accesses.tolist(), num_hits.tolist()


def _ratio(hits: int, accesses: int) -> float | None:
    return hits / accesses if accesses else None
