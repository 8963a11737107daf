"""What a cache is worth to the servers: times to first token and GPU time, with it and without any."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pikv_core.simulation.cost.hardware import Hardware
from pikv_core.simulation.cost.kv_model import KvModel
from pikv_core.simulation.cost.prefill import compute_s
from pikv_core.simulation.cost.serving import serve
from pikv_core.simulation.trace import Trace


@dataclass(frozen=True)
class ServingRow:
    """Requests after the warm-up; the others are served too. Utilisation above 1: more work arrives than is done.

    utilisation: work over the servers' time from the first to the last arrival, None where all arrive at once; above 1
    the queue grows as long as requests come, and times to first token tell the length of the trace.
    """

    ttft_p50_s: float
    ttft_p95_s: float
    ttft_p99_s: float
    ttft_p50_without_cache_s: float
    ttft_p95_without_cache_s: float
    ttft_p99_without_cache_s: float
    slo_s: float | None
    slo_share: float | None  # of the requests, first token within slo_s
    slo_share_without_cache: float | None
    gpu_s: float
    gpu_s_without_cache: float
    gpu_s_saved: float
    gpu_s_saved_share: float
    utilisation: float | None
    utilisation_without_cache: float | None


@dataclass(frozen=True)
class _Side:
    """The figures of one way of serving."""

    percentiles_s: tuple[float, float, float]
    slo_share: float | None
    busy_s: float
    utilisation: float | None


def serving_row(
    trace: Trace,
    hit_tokens: NDArray[np.integer],
    model: KvModel,
    hardware: Hardware,
    num_servers: int = 1,
    slo_s: float | None = None,
    warm_up: int = 0,
) -> ServingRow:
    """Serve the trace with these cached tokens [R], which lie in the GPU's memory: nothing has to be loaded."""
    service_s = compute_s(model, hardware, trace.input_tokens, hit_tokens)
    return compare(trace, service_s, model, hardware, num_servers, slo_s, warm_up)


def compare(
    trace: Trace,
    service_s: NDArray[np.float64],
    model: KvModel,
    hardware: Hardware,
    num_servers: int = 1,
    slo_s: float | None = None,
    warm_up: int = 0,
) -> ServingRow:
    """Serve the trace in these times [R] and in those without a cache."""
    uncached_s = compute_s(model, hardware, trace.input_tokens, 0)
    with_, without = (
        _side(trace.timestamps_ms / 1000, seconds, num_servers, slo_s, warm_up) for seconds in (service_s, uncached_s)
    )
    saved_s = (without.busy_s - with_.busy_s) * hardware.gpus
    return ServingRow(
        *with_.percentiles_s,
        *without.percentiles_s,
        slo_s=slo_s,
        slo_share=with_.slo_share,
        slo_share_without_cache=without.slo_share,
        gpu_s=with_.busy_s * hardware.gpus,
        gpu_s_without_cache=without.busy_s * hardware.gpus,
        gpu_s_saved=saved_s,
        gpu_s_saved_share=saved_s / (without.busy_s * hardware.gpus) if without.busy_s else 0.0,
        utilisation=with_.utilisation,
        utilisation_without_cache=without.utilisation,
    )


def _side(arrival_s: NDArray[Any], service_s: NDArray[Any], num_servers: int, slo_s: float | None, skip: int) -> _Side:
    ttft_s = serve(arrival_s, service_s, num_servers).ttft_s[skip:]
    p50, p95, p99 = (float(value) for value in np.percentile(ttft_s, (50, 95, 99)))
    busy_s = float(service_s[skip:].sum())
    span_s = float(arrival_s[-1] - arrival_s[skip])
    return _Side(
        percentiles_s=(p50, p95, p99),
        slo_share=None if slo_s is None else float((ttft_s <= slo_s).mean()),
        busy_s=busy_s,
        utilisation=busy_s / (num_servers * span_s) if span_s > 0 else None,
    )
