"""Replay a request log under policies and capacities, or draw the exact hits of every capacity at once."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from pikv_core.components import build
from pikv_core.errors import UsageError
from pikv_core.files import replacing
from pikv_core.runs import Run
from pikv_core.schema import SimulateRecipe
from pikv_core.simulation.ceiling import ceiling_hits
from pikv_core.simulation.curve import Curve, curve
from pikv_core.simulation.load import load
from pikv_core.simulation.metrics import hit_row
from pikv_core.simulation.picture import draw
from pikv_core.simulation.policies import REQUEST_POLICIES
from pikv_core.simulation.replay import Semantics, Touch, replay
from pikv_core.simulation.trace import Trace


@dataclass(frozen=True)
class Result:
    """Rows by policy and capacity, with the conventions they were counted under."""

    trace: str
    semantics: Semantics
    touch: Touch  # a row's own `touch` tells the order where a policy needs another
    block_tokens: int
    format: str
    partial_block_counts: bool  # the last, partial block of a prompt has an id and can be hit
    outputs_inserted: bool
    warm_up_share: float  # of the requests, not counted
    num_requests: int
    num_unique_blocks: int
    ceiling_hits: int  # blocks, with infinite capacity
    ceiling_hit_ratio: float
    results: list[dict[str, Any]]
    curve: dict[str, list[float]] | None  # of lru


def run(recipe: SimulateRecipe, run: Run) -> Result:
    """Read the trace, replay every policy at every capacity, and write the run folder."""
    trace = load(recipe.trace).trace
    semantics = _semantics(recipe, trace)
    run.reporter.status(
        f"{recipe.trace}: {trace.num_requests:,} requests, {trace.ids.size:,} block accesses, "
        f"{trace.num_blocks:,} unique blocks of {trace.block_tokens} tokens"
    )
    capacities = [blocks for blocks in dict.fromkeys(recipe.capacities) if isinstance(blocks, int)] or capacity_grid(
        trace.num_blocks
    )
    touch: Touch = "forward" if semantics == "object" else recipe.touch or "reverse"
    warm_up = int(recipe.warm_up * trace.num_requests)
    rows = _replay_all(recipe, trace, semantics, capacities, warm_up, run)
    ceiling = ceiling_hits(trace, semantics)
    run.telemetry.scalar("ceiling/block_hit_ratio", ceiling / trace.ids.size)
    result = Result(
        trace=recipe.trace,
        semantics=semantics,
        touch=touch,
        block_tokens=trace.block_tokens,
        format="mooncake",
        partial_block_counts=recipe.partial_blocks,
        outputs_inserted=False,
        warm_up_share=recipe.warm_up,
        num_requests=trace.num_requests,
        num_unique_blocks=trace.num_blocks,
        ceiling_hits=ceiling,
        ceiling_hit_ratio=ceiling / trace.ids.size,
        results=rows,
        curve=_curve(trace, touch, capacities, rows, run) if recipe.curve else None,
    )
    run.finish(result, {"replay": "numba"})
    return result


def _semantics(recipe: SimulateRecipe, trace: Trace) -> Semantics:
    """Return what counts as a hit: as asked, else what the log can tell."""
    if trace.is_objects and recipe.semantics == "prefix":
        raise UsageError(
            f"{recipe.trace}: a log of single objects has no prefixes",
            hint="leave --semantics out, or use --semantics object",
        )
    return "object" if trace.is_objects else recipe.semantics or "prefix"


def capacity_grid(num_blocks: int) -> list[int]:
    """Return capacities from a 64th of the unique blocks to all of them, each twice the one before."""
    return sorted({max(1, -(-num_blocks // 2**halvings)) for halvings in range(7)})


def _replay_all(
    recipe: SimulateRecipe, trace: Trace, semantics: Semantics, capacities: list[int], warm_up: int, run: Run
) -> list[dict[str, Any]]:
    rows = []
    policies = [build(REQUEST_POLICIES, component) for component in recipe.policies]
    pairs = list(product(policies, capacities))
    for done, (policy, capacity) in enumerate(pairs):
        run.reporter.progress(f"replay: {policy.name} at {capacity:,} blocks", done, len(pairs))
        found = hit_row(trace, replay(trace, policy, capacity, semantics, recipe.touch), warm_up)
        rows.append(asdict(found))
        run.telemetry.scalar(f"block_hit_ratio/{policy.name}", found.block_hit_ratio, capacity)
        run.telemetry.scalar(f"token_hit_ratio/{policy.name}", found.token_hit_ratio, capacity)
    return rows


def _curve(
    trace: Trace, touch: Touch, capacities: list[int], rows: list[dict[str, Any]], run: Run
) -> dict[str, list[float]]:
    """Write curve.npz (every capacity) and curve.png, and return the curve at the capacities asked for."""
    run.reporter.status("curve: lru at every capacity")
    whole = curve(trace, touch)
    _write_curve(whole, run.folder / "curve.npz")
    with replacing(run.folder / "curve.png") as temporary:
        draw(whole, rows, temporary)
    at = np.minimum(capacities, trace.num_blocks)
    return {
        "capacity_blocks": list(capacities),
        "block_hits": whole.block_hits[at].tolist(),
        "block_hit_ratio": (whole.block_hits[at] / whole.block_accesses).tolist(),
        "token_hit_ratio": (whole.token_hits[at] / max(1, whole.input_tokens)).tolist(),
    }


def _write_curve(whole: Curve, path: Path) -> None:
    with replacing(path) as temporary:
        np.savez_compressed(
            temporary,
            capacity_blocks=np.arange(whole.block_hits.size),
            block_hits=whole.block_hits,
            token_hits=whole.token_hits,
        )
