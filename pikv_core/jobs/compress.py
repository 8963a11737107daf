"""Sweep cache methods over budgets on one model; every number is measured on the same prompts in the same run."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pikv_core.evaluation.methods import expand
from pikv_core.runs import Run, find_model, plain
from pikv_core.schema import CompressRecipe

if TYPE_CHECKING:
    from pikv_core.evaluation.sweep import Row, Workload
    from pikv_core.model.loading import LoadedModel


@dataclass(frozen=True)
class CompressResult:
    """Rows of a sweep, and what they were measured on."""

    model: str
    question: str
    recall_of: str
    perplexity_of: str
    num_queries: int
    context_tokens: int
    results: list[dict[str, Any]]


def run(recipe: CompressRecipe, run: Run) -> CompressResult:
    """Measure every method at every budget, and write results.jsonl and pareto.png."""
    methods = expand(recipe.methods, recipe.budgets, recipe.allocation)
    find_model(recipe.model)

    from pikv_core.cache import PiKVCache
    from pikv_core.evaluation import pareto
    from pikv_core.evaluation.sweep import measure
    from pikv_core.model.loading import load_model

    loaded = load_model(recipe.model, recipe)
    for method in methods:  # every cache can be made before the first is measured
        PiKVCache(loaded.model.config, PiKVCache.in_tokens(loaded.model.config, method.cache, loaded.model.dtype))
    work = _workload(recipe, loaded, run)
    folder = run.folder
    rows: list[Row] = []
    for index, method in enumerate(methods):
        run.reporter.progress(f"sweep: {method.label} at {method.cache.budget}", index, len(methods))
        row = measure(loaded, method, work)
        rows.append(row)
        with (folder / "results.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(plain(row)) + "\n")
        for name in ("resident_bytes", "full_bytes", "perplexity", "recall", "attention_error", "ms_per_token"):
            run.telemetry.scalar(f"{method.label}/{name}", getattr(row, name), index)
        run.reporter.status(
            f"{method.label} at {method.cache.budget}: {row.resident_bytes / row.full_bytes:.3f} of the bytes, "
            f"recall {row.recall:.3f}, perplexity {row.perplexity:.4g}, {row.ms_per_token:.2f} ms/token"
        )
    pareto.draw(rows, work.perplexity_of, folder / "pareto.png")
    result = CompressResult(
        model=loaded.source,
        question=recipe.question,
        recall_of=work.prompts.source,
        perplexity_of=work.perplexity_of,
        num_queries=work.prompts.depth.numel(),
        context_tokens=recipe.context_tokens,
        results=[plain(row) for row in rows],
    )
    run.finish(result, {"attention": loaded.backend})
    return result


def _workload(recipe: CompressRecipe, loaded: LoadedModel, run: Run) -> Workload:
    from pikv_core.evaluation import prompts
    from pikv_core.evaluation.speed import NUM_STEPS
    from pikv_core.evaluation.sweep import Workload

    longest = recipe.context_tokens + max(recipe.continuation_tokens + 1, NUM_STEPS)
    loaded.check_length(longest, run.reporter)
    text = prompts.read_text(loaded, recipe.text, recipe.column, recipe.seed, run.reporter)
    stream = text[0] if text is not None else None
    length = recipe.context_tokens + recipe.continuation_tokens + 1
    windows = None
    if text is not None:
        windows = prompts.text_windows(loaded, *text, recipe.num_texts, length, recipe.seed)
    asked = prompts.recall_prompts(loaded, stream, recipe.num_queries, recipe.context_tokens, recipe.seed)
    return Workload(asked, windows, recipe.context_tokens, recipe.question, recipe.batch_size)
