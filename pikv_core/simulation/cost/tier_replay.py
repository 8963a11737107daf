"""Replay a trace over tiers of memory: what each serves, reads and writes, and what requests wait for.

On arrival the leading run of blocks that some tier holds is found, each in its fastest tier. Of this run the prefix
is used that makes the first token soonest, by the time to load it and to compute the rest, `overlap` of the shorter
hidden behind the longer: what a slow tier holds is recomputed where that is faster. Then the request's blocks are
touched or enter the top tier. A tier's policy hears of the blocks that are used from there, that enter, and that
leave the tier above while it holds them: a lower tier's lists are in the order in which blocks came down. Reads are
part of the time to first token; writes go on beside and cost bytes alone. All servers share the tiers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pikv_core.simulation.cost.hardware import Hardware
from pikv_core.simulation.cost.kv_model import KvModel
from pikv_core.simulation.cost.prefill import compute_s
from pikv_core.simulation.cost.serving import serve
from pikv_core.simulation.cost.serving_row import ServingRow, compare
from pikv_core.simulation.cost.tier_loop import CAPACITY, HITS, NUM_COLUMNS, THROUGH, Room, tier_loop
from pikv_core.simulation.cost.tier_rows import TierRow, tier_row
from pikv_core.simulation.cost.tiers import Tier
from pikv_core.simulation.replay import Touch, slices, touch_order
from pikv_core.simulation.trace import Trace


@dataclass(frozen=True)
class TierRequests:
    """What each request of the trace found and waited for, those of the warm-up too; [R] each."""

    blocks_found: NDArray[np.int64]  # leading blocks that some tier held
    blocks_used: NDArray[np.int64]  # of these, not recomputed
    tokens_used: NDArray[np.int64]
    load_s: NDArray[np.float64]
    compute_s: NDArray[np.float64]
    ttft_s: NDArray[np.float64]


@dataclass(frozen=True)
class TierStudy:
    """A replay over tiers; counts are of the requests after the warm-up."""

    tiers: list[TierRow]
    serving: ServingRow
    touch: Touch
    overlap: float
    block_accesses: int
    block_hits: int  # leading blocks that some tier held
    block_hit_ratio: float
    token_hit_ratio: float  # share of input tokens that were used from a tier
    requests: TierRequests = dataclasses.field(repr=False)

    def plain(self) -> dict[str, Any]:
        """Return what a JSON result holds: everything but the arrays by request."""
        rest = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "requests"}
        return {
            **rest,
            "tiers": [dataclasses.asdict(row) for row in self.tiers],
            "serving": dataclasses.asdict(self.serving),
        }


def replay_tiers(
    trace: Trace,
    tiers: Sequence[Tier],
    model: KvModel,
    hardware: Hardware,
    overlap: float = 0.0,
    num_servers: int = 1,
    slo_s: float | None = None,
    warm_up: int = 0,
    progress: Callable[[int, int], None] | None = None,
    backend: Literal["numba", "python"] = "numba",
    touch: Touch | None = None,
) -> TierStudy:
    """Replay the whole trace from empty tiers, top first; warm_up: requests that are replayed but not counted.

    overlap: share of the shorter of loading and computing that hides behind the longer. progress: called now and then
    with the requests done and all of them. touch: as asked, where the top tier's policy allows it.
    """
    order = touch_order(tiers[0].policy, "prefix", touch)
    found, used = np.zeros(trace.num_requests, np.int64), np.zeros(trace.num_requests, np.int64)
    load_s = np.zeros(trace.num_requests)
    tally = np.zeros((len(tiers), NUM_COLUMNS), np.int64)
    run = _bound(trace, tiers, model, hardware, overlap, order, tally, (found, used, load_s), backend)
    for first, last in slices(trace, warm_up):
        if first == warm_up:
            tally[:, HITS:] = 0
        run(first, last)
        if progress is not None:
            progress(last, trace.num_requests)
    tokens_used = np.minimum(trace.block_tokens * used, trace.input_tokens)
    computed_s = compute_s(model, hardware, trace.input_tokens, tokens_used)
    service_s = overlap * np.maximum(computed_s, load_s) + (1 - overlap) * (computed_s + load_s)
    arrival_s = trace.timestamps_ms / 1000
    accesses = int(trace.blocks_per_request[warm_up:].sum())
    span_s = float(arrival_s[-1] - arrival_s[warm_up])
    return TierStudy(
        tiers=[tier_row(tier, count, trace, model, hardware, accesses, span_s) for tier, count in zip(tiers, tally)],
        serving=compare(trace, service_s, model, hardware, num_servers, slo_s, warm_up),
        touch=order,
        overlap=overlap,
        block_accesses=accesses,
        block_hits=int(found[warm_up:].sum()),
        block_hit_ratio=int(found[warm_up:].sum()) / max(1, accesses),
        token_hit_ratio=int(tokens_used[warm_up:].sum()) / max(1, int(trace.input_tokens[warm_up:].sum())),
        requests=TierRequests(
            blocks_found=found,
            blocks_used=used,
            tokens_used=tokens_used,
            load_s=load_s,
            compute_s=computed_s,
            ttft_s=serve(arrival_s, service_s, num_servers, backend).ttft_s,
        ),
    )


def _bound(
    trace: Trace,
    tiers: Sequence[Tier],
    model: KvModel,
    hardware: Hardware,
    overlap: float,
    order: Touch,
    tally: NDArray[np.int64],
    requests: tuple[NDArray[Any], ...],
    backend: Literal["numba", "python"],
) -> Callable[[int, int], None]:
    """Return the loop as a function of the first and the last request."""
    capacities = [_capacity(tier, trace) for tier in tiers]
    states = tuple(tier.policy.state(trace, capacity) for tier, capacity in zip(tiers, capacities))
    tally[:, CAPACITY] = capacities
    tally[:, THROUGH] = [tier.writes_through for tier in tiers]
    resident = np.zeros((len(tiers), trace.num_blocks), np.uint8)
    room = Room(tally, resident, np.zeros((trace.num_blocks + 1, 2), np.int64))
    block_bytes = model.block_bytes(trace.block_tokens)
    load = (
        np.array([tier.latency_s for tier in tiers]),
        np.array([block_bytes / tier.read_bytes_per_s for tier in tiers]),
    )
    work_s = np.array([2.0 * model.num_active_params, model.attention_flops]) / hardware.flops_per_s
    longest = int(trace.blocks_per_request.max(initial=1))
    scratch = (np.zeros(max(1, longest), np.uint8), np.zeros(len(tiers), np.uint8))
    promotes = np.array([tier.promotes for tier in tiers], np.uint8)
    loop = tier_loop([tier.policy for tier in tiers], backend)
    before = (trace.ids, trace.starts, trace.input_tokens, trace.block_tokens)
    after = (order == "reverse", states, room, promotes, float(overlap), work_s, load, scratch, *requests)
    return lambda first, last: loop(*before, first, last, *after)


def _capacity(tier: Tier, trace: Trace) -> int:
    is_whole = tier.capacity_blocks is None or tier.policy.unbounded
    return max(1, trace.num_blocks if is_whole else min(tier.capacity_blocks or 1, trace.num_blocks))
