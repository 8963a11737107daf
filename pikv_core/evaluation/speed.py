"""What a cache costs while it runs: bytes of live storage, and time per decoded token."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from pikv_core.cache import PiKVCache
from pikv_core.model.steps import prefill, step

NUM_STEPS = 32
WARM_UP_STEPS = 4


@dataclass(frozen=True)
class Cost:
    """Of one sequence: a prompt, then NUM_STEPS tokens; the time is the median step after a warm-up.

    events: what the cache reported while it ran, such as switches. read_bytes_per_token: of keys and values or their
    codes, and of what a selector chose by, in NUM_STEPS steps after those. slow_read_share: of these bytes, those of
    slow shards.
    """

    resident_bytes: int
    peak_bytes: int
    full_bytes: int
    ms_per_token: float
    prefill_ms: float
    read_bytes_per_token: int
    slow_read_share: float
    events: list[dict[str, Any]]


def measure_cost(model: Any, new_cache: Callable[[], PiKVCache], prompt: torch.Tensor, future: torch.Tensor) -> Cost:
    """Decode greedily behind a prompt [1,T] and measure the cache; `future` [1,F] is shown to policies that ask."""

    def now() -> float:
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    cache = new_cache()
    start = now()
    logits = prefill(model, cache, prompt, future)
    times = [now()]
    for _ in range(NUM_STEPS):
        logits = step(model, cache, logits.argmax(-1))
        times.append(now())
    held = (cache.resident_bytes, cache.peak_bytes, cache.full_bytes)
    events = list(cache.events)
    reads = cache.count_reads()
    for _ in range(NUM_STEPS):
        logits = step(model, cache, logits.argmax(-1))
    steps = [later - earlier for earlier, later in zip(times[WARM_UP_STEPS:], times[WARM_UP_STEPS + 1 :])]
    return Cost(
        *held,
        1e3 * statistics.median(steps),
        1e3 * (times[0] - start),
        round(reads.num_bytes / NUM_STEPS),
        reads.slow_bytes / reads.num_bytes,
        events,
    )
