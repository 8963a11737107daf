"""Sweep cache methods over budgets on one model; every number is measured on the same prompts in the same run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pikv_core.errors import PiKVError
from pikv_core.evaluation.cells import Cell, expand
from pikv_core.evaluation.ledger import Ledger
from pikv_core.evaluation.ranks import Ranks
from pikv_core.evaluation.row import Row, Skipped
from pikv_core.evaluation.sweep import sweep
from pikv_core.evaluation.target import Target
from pikv_core.runs import Run, find_model, plain
from pikv_core.schema import CompressRecipe

if TYPE_CHECKING:
    from pikv_core.evaluation.workload import Workload
    from pikv_core.model.loading import LoadedModel

LOGGED = ["resident_bytes", "full_bytes", "perplexity", "recall", "agreement", "agreement_kl", "ruler"]
LOGGED += ["attention_error", "attention_mass", "ms_per_token", "read_bytes_per_token"]


@dataclass(frozen=True)
class CompressResult:
    """Rows of a sweep, what they were measured on, and what was refused.

    cheapest: the row of the fewest bytes that reaches the target, None where none does or none is asked for.
    """

    model: str
    question: str
    recall_of: str | None
    perplexity_of: str
    num_queries: int
    context_tokens: int
    results: list[dict[str, Any]]
    skipped: list[dict[str, Any]]
    target: str | None
    cheapest: dict[str, Any] | None


def run(recipe: CompressRecipe, run: Run) -> CompressResult | None:
    """Measure every method at every budget; write results.jsonl, pareto.png and layers.png.

    Finished cells of a resumed run stay. Under torchrun the ranks share the cells; rank 0 alone returns a result.
    """
    cells = expand(recipe)
    find_model(recipe.model)

    from pikv_core.cache.backend import attending_by
    from pikv_core.model.loading import device_of

    with attending_by(recipe.backend, device_of(recipe)):
        return _measure(recipe, run, cells)


def _measure(recipe: CompressRecipe, run: Run, cells: Sequence[Cell]) -> CompressResult | None:
    from pikv_core.evaluation.measure import measure
    from pikv_core.evaluation.workload import Workload
    from pikv_core.model.loading import load_model

    ranks = Ranks.of_torchrun()
    plan = json.loads(ranks.hear("plan")) if ranks.rank else None  # rank 0 tells it when everything is checked
    loaded = load_model(recipe.model, recipe)
    if plan is None:
        _check(cells, loaded)
    work = Workload.of(recipe, loaded, run.reporter)
    measure_cell = partial(measure, loaded, work=work)
    if plan is not None:
        left = [cell for cell in cells if cell.key in plan["left"]]
        for _ in sweep(left, measure_cell, Ledger(Path(plan["folder"]), ranks.rank), ranks, run.reporter):
            pass
        ranks.end()
        return None

    ledger = Ledger(run.folder)
    finished = {key: row for key, row in ledger.read().items() if isinstance(row, Row)}
    ledger.rewrite(finished.values())
    left = [cell for cell in cells if cell.key not in finished]
    if run.resumed:
        run.reporter.status(f"going on after {len(cells) - len(left)} of {len(cells)} cells")
    if ranks.count > 1:
        run.reporter.status(f"{ranks.count} ranks share the cells; each time is measured beside the others' work")
    ranks.tell("plan", json.dumps({"folder": str(run.folder.absolute()), "left": [cell.key for cell in left]}))
    logged: set[str] = set()
    try:
        for entry in sweep(left, measure_cell, ledger, ranks, run.reporter):
            _log(run, entry, cells)
            logged.add(entry.key)
        ranks.end()
    except KeyboardInterrupt:
        run.telemetry.close()
        raise PiKVError(
            f"interrupted after {len(ledger.read())} of {len(cells)} cells",
            hint=f"go on with `pikv compress --resume {run.folder}`",
        ) from None
    entries = ledger.read()
    for key in entries.keys() - logged - finished.keys():
        _log(run, entries[key], cells)
    return _finish(recipe, run, cells, ledger, loaded, work, ranks.count)


def _check(cells: Sequence[Cell], loaded: LoadedModel) -> None:
    """Make every cache before the first is measured; raise where the full one, or every other one, is refused."""
    from pikv_core.cache import PiKVCache

    errors: list[PiKVError] = []
    for cell in cells:
        try:
            loaded.new_cache(PiKVCache.in_tokens(loaded.model, cell.cache))
        except PiKVError as error:
            errors.append(error)
            if cell.is_full:
                raise
    if errors and len(errors) == len(cells) - 1:
        raise errors[0]


def _finish(
    recipe: CompressRecipe,
    run: Run,
    cells: Sequence[Cell],
    ledger: Ledger,
    loaded: LoadedModel,
    work: Workload,
    num_ranks: int,
) -> CompressResult:
    """Gather what all ranks found, draw it, and look for the target."""
    from pikv_core.evaluation.layers import draw_layers, drawn
    from pikv_core.evaluation.pareto import draw

    entries = ledger.read()
    ours = {cell.key: entries.pop(cell.key) for cell in cells}
    ledger.rewrite([*ours.values(), *entries.values()])
    rows = [entry for entry in ours.values() if isinstance(entry, Row)]
    skipped = [entry for entry in ours.values() if isinstance(entry, Skipped)]
    if skipped and len(skipped) == len(cells) - 1:
        raise PiKVError(skipped[0].reason, skipped[0].hint)
    draw(rows, work.perplexity_of, run.folder / "pareto.png")
    if drawn(rows):
        draw_layers(rows, run.folder / "layers.png")
    results = [plain(row) for row in rows]
    result = CompressResult(
        model=loaded.source,
        question=recipe.question,
        recall_of=work.prompts[0].source if work.prompts is not None else None,
        perplexity_of=work.perplexity_of,
        num_queries=work.num_queries,
        context_tokens=recipe.context_tokens,
        results=results,
        skipped=[plain(entry) for entry in skipped],
        target=recipe.target,
        cheapest=Target.parse(recipe.target).cheapest(results) if recipe.target is not None else None,
    )
    run.finish(result, {**loaded.backends, "ranks": str(num_ranks)})
    return result


def _log(run: Run, entry: Row | Skipped, cells: Sequence[Cell]) -> None:
    """Log a row to TensorBoard; the step of a cell is its place in the sweep, that of a layer its index."""
    if isinstance(entry, Skipped):
        return
    place = [cell.key for cell in cells].index(entry.key)
    for name in LOGGED:
        if (value := getattr(entry, name)) is not None:
            run.telemetry.scalar(f"{entry.method}/{name}", value, place)
    for name in ("attention_error_by_layer", "attention_mass_by_layer"):
        for layer, value in enumerate(getattr(entry, name) or []):
            run.telemetry.scalar(f"{entry.method} at {entry.budget}/{name}", value, layer)
    run.telemetry.scalar(f"{entry.method} at {entry.budget}/events", len(entry.events))
