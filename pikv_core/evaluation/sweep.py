"""Measure one cache method on a model: quality against the context's truth, bytes, time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from pikv_core.cache import PiKVCache
from pikv_core.errors import PiKVError
from pikv_core.evaluation.attention_error import AttentionError
from pikv_core.evaluation.methods import Method, label
from pikv_core.evaluation.perplexity import measure_perplexity
from pikv_core.evaluation.prompts import RecallPrompts, TextWindows
from pikv_core.evaluation.recall import measure_recall
from pikv_core.evaluation.speed import measure_cost
from pikv_core.model.loading import LoadedModel


@dataclass(frozen=True)
class Row:
    """What one method did at one budget; bytes, of the budget too, are of one sequence: the prompt and 32 tokens."""

    policy: str
    codec: str
    allocation: str
    budget: float | int | str
    resident_bytes: int
    full_bytes: int
    peak_bytes: int
    perplexity: float
    recall: float
    recall_interval: float
    recall_by_depth: list[float | None]
    attention_error: float
    ms_per_token: float
    prefill_ms: float
    backend: str

    @property
    def label(self) -> str:
        """Name policy and codec, as on the command line."""
        return label(self.policy, self.codec)


@dataclass(frozen=True)
class Workload:
    """What every method is measured on; `texts` is None for a model that no text speaks to."""

    prompts: RecallPrompts
    texts: TextWindows | None
    prompt_tokens: int
    question: Literal["inside", "after"]
    batch_size: int

    @property
    def perplexity_of(self) -> str:
        """Say which tokens the perplexity is of."""
        return self.texts.source if self.texts is not None else "the answers to the recall questions"


def measure(loaded: LoadedModel, method: Method, work: Workload) -> Row:
    """Measure one method on the workload."""
    model = loaded.model
    probes: list[AttentionError] = []

    cache_recipe = PiKVCache.in_tokens(model.config, method.cache, model.dtype)

    def new_cache() -> PiKVCache:
        return PiKVCache(model.config, cache_recipe)

    def probed_cache() -> PiKVCache:
        cache = new_cache()
        probes.append(AttentionError(cache, model.config))
        return cache

    recall = measure_recall(model, new_cache, work.prompts, work.question, work.batch_size)
    windows = work.texts or TextWindows(work.prompts.joined(work.batch_size), work.prompts.source)
    context_tokens = work.prompts.context.shape[1] if work.texts is None else work.prompt_tokens
    perplexity = measure_perplexity(model, probed_cache, windows, context_tokens, work.batch_size)
    if work.texts is None:
        perplexity = recall.answer_perplexity
    if math.isnan(perplexity) or any(math.isnan(probe.value) for probe in probes):
        raise PiKVError(
            f"{method.label} at {method.cache.budget}: the model's numbers are not finite ({loaded.backend})",
            hint="measure in --dtype float32",
        )
    cost = measure_cost(model, new_cache, windows.ids[:1, : work.prompt_tokens])
    return Row(
        policy=method.cache.policy.name,
        codec=method.cache.codec.name,
        allocation=method.cache.allocation.name,
        budget=method.cache.budget,
        resident_bytes=cost.resident_bytes,
        full_bytes=cost.full_bytes,
        peak_bytes=cost.peak_bytes,
        perplexity=perplexity,
        recall=recall.share,
        recall_interval=recall.interval,
        recall_by_depth=recall.by_depth,
        attention_error=sum(probe.value for probe in probes) / len(probes),
        ms_per_token=cost.ms_per_token,
        prefill_ms=cost.prefill_ms,
        backend=loaded.backend,
    )
