"""Replay a request log under policies and capacities, and draw the exact hits of every capacity at once."""

from __future__ import annotations

import os
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pikv_core.errors import PiKVError
from pikv_core.runs import Run
from pikv_core.schema import SimulateRecipe
from pikv_core.simulation import lru_curve
from pikv_core.simulation.ceiling import ceiling_hits
from pikv_core.simulation.cost.billing import Bill
from pikv_core.simulation.cost.priced import build_priced
from pikv_core.simulation.lru_curve import LRUCurve
from pikv_core.simulation.metrics import hit_row, hit_tokens
from pikv_core.simulation.opened import Conventions, open_trace
from pikv_core.simulation.products import Products, products
from pikv_core.simulation.sweep import sweep
from pikv_core.simulation.trace import Trace

OPTIMUM = "belady"


@dataclass(frozen=True)
class HitStudy(Conventions):
    """Rows by policy and capacity, with the conventions they were counted under."""

    bill: dict[str, Any] | None  # what blocks weigh and prompts cost
    ceiling_hits: int  # blocks, of an infinite cache, after the warm-up
    ceiling_hit_ratio: float
    results: list[dict[str, Any]]
    curve: LRUCurve | None


def run(recipe: SimulateRecipe, run: Run) -> HitStudy:
    """Read the trace, replay every policy at every capacity, and write the run folder."""
    bill = Bill.of(recipe.serving)
    model = None if bill is None else bill.model
    policies = {each.label(): build_priced(each, model, recipe.seed) for each in recipe.policies}
    trace, conventions = open_trace(recipe, run)
    told = {**vars(conventions), "bill": None if bill is None else bill.told()}
    if not trace.ids.size:
        rows = [_without_blocks(conventions, bill, trace)]
        study = HitStudy(**told, ceiling_hits=0, ceiling_hit_ratio=0.0, results=rows, curve=None)
        run.finish(study)
        return study
    warm_up = conventions.warm_up_requests
    capacities = _capacities(recipe, bill, trace)
    ceiling = ceiling_hits(trace, conventions.semantics, warm_up=warm_up)
    ratio = ceiling / max(1, int(trace.blocks_per_request[warm_up:].sum()))
    pairs = [(label, capacity) for label in policies for capacity in capacities]
    rows = []
    replays = sweep(
        trace,
        [(policies[label], capacity) for label, capacity in pairs],
        conventions.semantics,
        recipe.touch,
        recipe.threads or os.cpu_count() or 1,
        _progress(pairs, run),
    )
    with (
        products(recipe, trace, bill, warm_up, capacities[len(capacities) // 2], run) as kept,
        closing(replays),
    ):
        for (label, capacity), found in zip(pairs, replays):
            row = {**asdict(hit_row(trace, found, warm_up)), "policy": label}
            rows.append(row | _costs(bill, trace, capacity, hit_tokens(trace, found.hits), warm_up))
            kept.take(label, capacity, found)
            run.telemetry.scalar(f"block_hit_ratio/{label}", row["block_hit_ratio"], capacity)
            run.telemetry.scalar(f"token_hit_ratio/{label}", row["token_hit_ratio"], capacity)
        rows = _compared(rows, ceiling)
        curve = _curve(recipe, conventions, trace, capacities, kept, run) if recipe.curve else None
        kept.finish(rows, ratio)
    run.telemetry.scalar("ceiling/block_hit_ratio", ratio)
    study = HitStudy(**told, ceiling_hits=ceiling, ceiling_hit_ratio=ratio, results=rows, curve=curve)
    run.finish(study, {"replay": "numba"})
    return study


def capacity_grid(num_blocks: int) -> list[int]:
    """Return capacities from a 64th of the unique blocks to all of them, each twice the one before."""
    return sorted({max(1, -(-num_blocks // 2**halvings)) for halvings in range(7)})


def _capacities(recipe: SimulateRecipe, bill: Bill | None, trace: Trace) -> list[int]:
    """Return the capacities in blocks, each once."""
    blocks = [
        int(capacity) if bill is None or isinstance(capacity, int) else bill.model.blocks(capacity, trace.block_tokens)
        for capacity in recipe.capacities
    ]
    return list(dict.fromkeys(blocks)) or capacity_grid(trace.num_blocks)


def _without_blocks(conventions: Conventions, bill: Bill | None, trace: Trace) -> dict[str, Any]:
    """Return what serving a log of lengths costs; no hits can be had from it."""
    if bill is None or bill.hardware is None:
        raise PiKVError(
            f"{conventions.trace}: a log of lengths alone ({conventions.format}) names no blocks, so it has no hits",
            hint="use a log with the blocks of each prompt; --kv-model and --hardware tell times without a cache",
        )
    none = np.zeros(trace.num_requests, np.int64)
    return {"policy": "none", **_costs(bill, trace, 0, none, conventions.warm_up_requests)}


def _costs(bill: Bill | None, trace: Trace, capacity: int, tokens: NDArray[np.integer], warm_up: int) -> dict[str, Any]:
    """Return bytes and times of a replay, as far as the recipe tells what they follow from; tokens: hit, [R]."""
    if bill is None:
        return {}
    weight = {"capacity_bytes": capacity * bill.model.block_bytes(trace.block_tokens)}
    return weight if bill.hardware is None else weight | asdict(bill.serving_row(trace, tokens, warm_up))


def _compared(rows: list[dict[str, Any]], ceiling: int) -> list[dict[str, Any]]:
    """Return the rows with their share of the ceiling's hits, and what their ratios lack to the optimum's."""
    optimum = {row["capacity_blocks"]: row["block_hit_ratio"] for row in rows if row["policy"] == OPTIMUM}
    return [
        {
            **row,
            "share_of_ceiling": row["block_hits"] / max(1, ceiling),
            "gap_to_optimum": optimum[row["capacity_blocks"]] - row["block_hit_ratio"] if optimum else None,
        }
        for row in rows
    ]


def _curve(
    recipe: SimulateRecipe, told: Conventions, trace: Trace, capacities: list[int], kept: Products, run: Run
) -> LRUCurve:
    run.reporter.status("curve: lru at every capacity")
    if recipe.sample is None:
        curve, arrays = lru_curve.exact(trace, capacities, told.semantics, told.touch, told.warm_up_requests)
    else:
        curve, arrays = lru_curve.estimated(trace, capacities, told.semantics, recipe.sample, recipe.seed)
    if curve.warning is not None:
        run.reporter.status(f"warning: {curve.warning}")
    kept.take_curve(arrays)
    return curve


def _progress(pairs: list[tuple[str, int]], run: Run) -> Any:
    """Return what is told of each replay how far it is."""
    done = [0.0] * len(pairs)

    def progress(index: int, share: float) -> None:
        done[index] = share
        label, capacity = pairs[index]
        run.reporter.progress(f"replay: {label} at {capacity:,} blocks", sum(done), len(pairs))

    return progress
