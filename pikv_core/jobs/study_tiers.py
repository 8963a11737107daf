"""Replay a request log over tiers of memory: what each serves and moves, and what requests wait for."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pikv_core.errors import PiKVError
from pikv_core.runs import Run
from pikv_core.schema import SimulateRecipe
from pikv_core.simulation import pictures
from pikv_core.simulation.ceiling import ceiling_hits
from pikv_core.simulation.cost.billing import Bill
from pikv_core.simulation.cost.tier_replay import replay_tiers
from pikv_core.simulation.cost.tiers import load_tiers
from pikv_core.simulation.opened import Conventions, open_trace
from pikv_core.simulation.per_request import per_request


@dataclass(frozen=True)
class TieredServing(Conventions):
    """A row for each tier, and what serving from all of them comes to; counts are of the requests after the warm-up."""

    bill: dict[str, Any]
    ceiling_hits: int  # blocks, of an infinite cache
    ceiling_hit_ratio: float
    block_accesses: int
    block_hits: int  # leading blocks that some tier held
    block_hit_ratio: float
    token_hit_ratio: float  # share of input tokens that were used from a tier
    serving: dict[str, Any]
    results: list[dict[str, Any]]


def run(recipe: SimulateRecipe, run: Run) -> TieredServing:
    """Read trace and tiers, replay, and write the run folder."""
    bill = Bill.of(recipe.serving)
    assert bill is not None and bill.hardware is not None and recipe.tiers is not None  # the recipe's own check
    trace, conventions = open_trace(recipe, run)
    if conventions.semantics != "prefix" or not trace.ids.size:
        raise PiKVError(
            f"{recipe.trace}: tiers serve prompts, and this log ({conventions.format}) is replayed without them",
            hint="use a log with the blocks of each prompt, and --semantics prefix",
        )
    tiers = load_tiers(recipe.tiers, bill.model, trace.block_tokens, recipe.seed)
    warm_up = conventions.warm_up_requests
    found = replay_tiers(
        trace,
        tiers,
        bill.model,
        bill.hardware,
        overlap=recipe.serving.overlap,
        num_servers=recipe.serving.servers,
        slo_s=recipe.serving.slo_s,
        warm_up=warm_up,
        progress=lambda done, total: run.reporter.progress("replay: over tiers", done, total),
        touch=recipe.touch,
    )
    ceiling = ceiling_hits(trace, "prefix", warm_up=warm_up)
    study = TieredServing(
        **{**vars(conventions), "touch": found.touch},
        bill=bill.told(),
        ceiling_hits=ceiling,
        ceiling_hit_ratio=ceiling / max(1, found.block_accesses),
        block_accesses=found.block_accesses,
        block_hits=found.block_hits,
        block_hit_ratio=found.block_hit_ratio,
        token_hit_ratio=found.token_hit_ratio,
        serving=asdict(found.serving),
        results=[asdict(row) for row in found.tiers],
    )
    if recipe.per_request is not None:
        with per_request(recipe.per_request, trace) as write:
            write({"tiers": "+".join(tier.name for tier in tiers)}, vars(found.requests))
    if recipe.plot:
        none = bill.ttft_s(trace, np.zeros(trace.num_requests, np.int64))[warm_up:]
        times = {"no cache": none, "tiers": found.requests.ttft_s[warm_up:]}
        pictures.draw_ttft(times, recipe.serving.slo_s, recipe.tiers, run.folder / "ttft.png")
        pictures.draw_tiers(study.results, run.folder / "tiers.png")
    for row in study.results:
        run.telemetry.scalar(f"block_hits/{row['tier']}", row["block_hits"])
    run.finish(study, {"replay": "numba"})
    return study
