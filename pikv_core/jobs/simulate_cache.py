"""Replay a request log under policies and capacities, or draw the exact hits of every capacity at once."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from pikv_core.errors import UsageError
from pikv_core.files import replacing
from pikv_core.runs import Run
from pikv_core.schema import SimulateRecipe
from pikv_core.simulation.ceiling import ceiling_hits
from pikv_core.simulation.curve import Curve, curve
from pikv_core.simulation.load import load
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
    if recipe.curve and recipe.semantics == "object":
        raise UsageError(
            "curve: the one-pass curve is of prefix hits, got semantics 'object'",
            hint="drop --curve, or use --semantics prefix",
        )
    trace = load(recipe.trace)
    run.reporter.status(
        f"{recipe.trace}: {trace.num_requests:,} requests, {trace.ids.size:,} block accesses, "
        f"{trace.num_blocks:,} unique blocks of {trace.block_tokens} tokens"
    )
    capacities = list(dict.fromkeys(recipe.capacities)) or capacity_grid(trace.num_blocks)
    touch: Touch = "forward" if recipe.semantics == "object" else recipe.touch or "reverse"
    rows = _replay_all(recipe, trace, capacities, run)
    ceiling = ceiling_hits(trace, recipe.semantics)
    run.telemetry.scalar("ceiling/block_hit_ratio", ceiling / trace.ids.size)
    result = Result(
        trace=recipe.trace,
        semantics=recipe.semantics,
        touch=touch,
        block_tokens=trace.block_tokens,
        partial_block_counts=True,
        outputs_inserted=False,
        warm_up_share=0.0,
        num_requests=trace.num_requests,
        num_unique_blocks=trace.num_blocks,
        ceiling_hits=ceiling,
        ceiling_hit_ratio=ceiling / trace.ids.size,
        results=rows,
        curve=_curve(trace, touch, capacities, rows, run) if recipe.curve else None,
    )
    run.finish(result, {"replay": "numba"})
    return result


def capacity_grid(num_blocks: int) -> list[int]:
    """Return capacities from a 64th of the unique blocks to all of them, each twice the one before."""
    return sorted({max(1, -(-num_blocks // 2**halvings)) for halvings in range(7)})


def _replay_all(recipe: SimulateRecipe, trace: Trace, capacities: list[int], run: Run) -> list[dict[str, Any]]:
    rows = []
    pairs = list(product(dict.fromkeys(recipe.policies), capacities))
    for done, (name, capacity) in enumerate(pairs):
        run.reporter.progress(f"replay: {name} at {capacity:,} blocks", done, len(pairs))
        found = replay(trace, REQUEST_POLICIES[name](), capacity, recipe.semantics, recipe.touch)
        rows.append(asdict(found))
        run.telemetry.scalar(f"block_hit_ratio/{name}", found.block_hit_ratio, capacity)
        run.telemetry.scalar(f"token_hit_ratio/{name}", found.token_hit_ratio, capacity)
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
