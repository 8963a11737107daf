"""Replay recorded attention under token policies and budgets, without the model."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from pikv_core.errors import PiKVError
from pikv_core.files import replacing
from pikv_core.runs import Run
from pikv_core.schema import CacheRecipe
from pikv_core.schema.simulate import AttentionReplayRecipe
from pikv_core.simulation.attention.measure import Measures
from pikv_core.simulation.attention.trace import HINT, AttentionTrace, load


@dataclass(frozen=True)
class Result:
    """Rows by policy and budget, means over steps, layers and heads; `details` has them by layer, head and step."""

    trace: str
    model: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    num_prompt_tokens: int
    num_steps: int
    top_p: float  # share of each row's attention that the trace was to hold at least
    recorded_mass: float  # share of the steps' attention that it holds, which all recalls are of
    top_tokens: int
    allocation: str
    results: list[dict[str, Any]]
    details: str
    plot: str | None


def run(recipe: AttentionReplayRecipe, run: Run) -> Result:
    """Read the trace, replay every policy under every budget, and write the run folder."""
    trace = load(recipe.trace)
    header = trace.header
    if not header.num_steps:
        raise PiKVError(f"{recipe.trace}: the trace has no decode steps, so there is nothing to measure", hint=HINT)
    run.reporter.status(
        f"{recipe.trace}: {header.model}, {header.num_layers} layers, {header.num_heads} heads over "
        f"{header.num_kv_heads}, {header.num_prompt_tokens:,} prompt tokens, {header.num_steps:,} steps"
    )
    caches, found = _replay_all(recipe, trace, run)
    rows = [
        {"policy": cache.policy.label(), "budget": cache.budget, **_means(measures, cache)}
        for cache, measures in zip(caches, found)
    ]
    for row in rows:
        place = f"{row['policy']}/{row['budget']}"
        for name in ("attention_recall", "top_token_hit_ratio", "resident_tokens", "oracle_recall"):
            run.telemetry.scalar(f"{name}/{place}", row[name])
    _write_details(caches, found, run)
    if recipe.plot:
        from pikv_core.simulation.attention.picture import draw

        with replacing(run.folder / "recall.png") as temporary:
            draw([(row["policy"], str(row["budget"])) for row in rows], found, temporary)
    result = Result(
        trace=recipe.trace,
        model=header.model,
        num_layers=header.num_layers,
        num_heads=header.num_heads,
        num_kv_heads=header.num_kv_heads,
        num_prompt_tokens=header.num_prompt_tokens,
        num_steps=header.num_steps,
        top_p=header.top_p,
        recorded_mass=trace.recorded_mass(),
        top_tokens=recipe.top_tokens,
        allocation=recipe.allocation.label(),
        results=rows,
        details=str(run.folder / "attention.npz"),
        plot=str(run.folder / "recall.png") if recipe.plot else None,
    )
    run.finish(result, {"replay": "torch on cpu"})
    return result


def _replay_all(
    recipe: AttentionReplayRecipe, trace: AttentionTrace, run: Run
) -> tuple[list[CacheRecipe], list[Measures]]:
    """Return the caches that were replayed and their measures; all are checked before the first one runs."""
    from pikv_core.components import build
    from pikv_core.scheduling import POLICIES
    from pikv_core.scheduling.allocation import ALLOCATIONS
    from pikv_core.simulation.attention.needs import check_needs

    policies = [build(POLICIES, component) for component in recipe.policies]
    check_needs(trace, policies, build(ALLOCATIONS, recipe.allocation))

    import torch

    from pikv_core.simulation.attention.replay import Replay

    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    caches = [
        CacheRecipe(policy=component, budget=budget, allocation=recipe.allocation)
        for component in recipe.policies
        for budget in (recipe.budgets if POLICIES[component.name].takes_budget else [1.0])
    ]
    replays = [Replay(trace, cache) for cache in caches]
    found = []
    for number, cache in enumerate(caches):

        def progress(done: int, total: int, number: int = number, cache: CacheRecipe = cache) -> None:
            run.reporter.progress(f"replay: {cache.policy.name} at {cache.budget}", number + done / total, len(caches))

        found.append(replays.pop(0).run(recipe.top_tokens, progress))
    return caches, found


def _means(measures: Measures, cache: CacheRecipe) -> dict[str, Any]:
    """Return the means of a row; pages are a selector's alone."""
    from pikv_core.scheduling import POLICIES
    from pikv_core.scheduling.base import Selector

    means: dict[str, Any] = {field.name: float(getattr(measures, field.name).mean()) for field in fields(measures)}
    if not issubclass(POLICIES[cache.policy.name], Selector):
        means["pages_read"] = None
    return {**means, "num_steps": len(measures.attention_recall)}


def _write_details(caches: list[CacheRecipe], found: list[Measures], run: Run) -> None:
    """Write every measure as [row, step, layer, head], in float32, with the rows' names."""
    arrays = {
        field.name: np.stack([getattr(measures, field.name) for measures in found]).astype(np.float32)
        for field in fields(Measures)
    }
    names = [f"{cache.policy.label()}, {cache.budget}" for cache in caches]
    with replacing(run.folder / "attention.npz") as temporary, temporary.open("wb") as stream:
        np.savez_compressed(stream, rows=np.array(names), **arrays)  # type: ignore[arg-type]
