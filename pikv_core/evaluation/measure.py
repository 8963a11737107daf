"""Measure one cell of a sweep on a model: quality against the context's truth and the full cache, bytes, time."""

from __future__ import annotations

import math
from typing import Any

from pikv_core.cache import PiKVCache
from pikv_core.errors import PiKVError
from pikv_core.evaluation.attention_error import AttentionError
from pikv_core.evaluation.cells import Cell
from pikv_core.evaluation.continuation import measure_continuation
from pikv_core.evaluation.recall import measure_recall
from pikv_core.evaluation.row import Row
from pikv_core.evaluation.speed import measure_cost
from pikv_core.evaluation.workload import Workload
from pikv_core.model.loading import LoadedModel
from pikv_core.schema import CacheRecipe


def measure(loaded: LoadedModel, cell: Cell, work: Workload) -> Row:
    """Measure one configuration on the workload; raises PiKVError where the cache refuses it."""
    model = loaded.model
    recipe = PiKVCache.in_tokens(model, cell.cache)
    found: dict[str, Any] = {}

    def new_cache() -> PiKVCache:
        return loaded.new_cache(recipe)

    if work.prompts is not None:
        recall = measure_recall(model, new_cache, work.prompts, work.question, work.batch_size)
        found |= {"recall": recall.share, "recall_interval": recall.interval}
        found |= {"recall_by_depth": recall.by_depth, "recall_by_needles": recall.by_needles}
    if work.tasks & {"perplexity", "agreement"}:
        found |= _beside_the_full_cache(loaded, recipe, work)
        if work.answers_alone:
            found["perplexity"] = recall.answer_perplexity if "perplexity" in work.tasks else None
        _check_finite(found, cell, loaded)
    if work.ruler is not None:
        from pikv_core.evaluation.ruler import measure_ruler

        ruler = measure_ruler(model, loaded.tokenizer, new_cache, work.ruler, work.batch_size, work.question)
        found |= {"ruler": ruler.score, "ruler_interval": ruler.interval, "ruler_by_task": ruler.by_task}
    context, future = work.windows.ids[:1, : work.context_tokens], work.windows.ids[:1, work.context_tokens :]
    cost = measure_cost(model, new_cache, context, future)
    return Row(
        key=cell.key,
        method=cell.label,
        policy=cell.cache.policy.name,
        codec=cell.cache.codec.name,
        allocation=cell.cache.allocation.name,
        budget=cell.cache.budget,
        resident_bytes=cost.resident_bytes,
        full_bytes=cost.full_bytes,
        peak_bytes=cost.peak_bytes,
        ms_per_token=cost.ms_per_token,
        prefill_ms=cost.prefill_ms,
        read_bytes_per_token=cost.read_bytes_per_token,
        slow_read_share=cost.slow_read_share,
        events=cost.events,
        backend=loaded.backend,
        **found,
    )


def _beside_the_full_cache(loaded: LoadedModel, recipe: CacheRecipe, work: Workload) -> dict[str, Any]:
    """Feed the continuations, each layer beside a full one and the model beside one with a full cache."""
    errors = AttentionError(loaded.model.config)
    text = measure_continuation(
        loaded.model,
        lambda: errors.watch(loaded.new_cache(recipe)),
        work.windows,
        work.context_tokens,
        work.batch_size,
        (lambda: loaded.new_cache(CacheRecipe())) if "agreement" in work.tasks else None,
    )
    error, mass = errors.error_by_layer, errors.mass_by_layer
    return {
        "perplexity": text.perplexity if "perplexity" in work.tasks else None,
        "agreement": text.agreement,
        "agreement_kl": text.agreement_kl,
        "attention_error": sum(error) / len(error),
        "attention_error_by_layer": error,
        "attention_mass": sum(mass) / len(mass),
        "attention_mass_by_layer": mass,
    }


def _check_finite(found: dict[str, Any], cell: Cell, loaded: LoadedModel) -> None:
    values = [found["attention_error"], found["attention_mass"], found["perplexity"], found["agreement_kl"]]
    if any(value is not None and math.isnan(value) for value in values):
        raise PiKVError(
            f"{cell}: the model's numbers are not finite ({loaded.backend})", hint="measure in --dtype float32"
        )
