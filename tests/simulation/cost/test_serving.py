"""The queue equals a simulation of servers and of a waiting line; the row's figures follow from it."""

from __future__ import annotations

import dataclasses
import json
import random

import numpy as np
import pytest

from pikv_core.simulation.cost.hardware import Hardware
from pikv_core.simulation.cost.kv_model import KvModel
from pikv_core.simulation.cost.prefill import compute_s
from pikv_core.simulation.cost.serving import serve
from pikv_core.simulation.cost.serving_row import serving_row
from pikv_core.simulation.trace import make_trace


def by_events(arrivals: list[float], services: list[float], num_servers: int) -> list[float]:
    """Return the waits, walking from event to event: a server that ends takes whoever has waited longest."""
    order = sorted(range(len(arrivals)), key=lambda request: arrivals[request])
    line: list[int] = []
    busy: list[float] = []
    waits = [0.0] * len(arrivals)
    now = 0.0
    while order or line:
        while order and arrivals[order[0]] <= now:
            line.append(order.pop(0))
        busy = [until for until in busy if until > now]
        while line and len(busy) < num_servers:
            request = line.pop(0)
            waits[request] = now - arrivals[request]
            busy.append(now + services[request])
            busy = [until for until in busy if until > now]
        coming = [arrivals[order[0]]] if order else []
        now = min([*busy, *coming], default=now)
    return waits


@pytest.mark.parametrize("backend", ["numba", "python"])
def test_waits_equal_those_of_an_event_simulation(backend: str) -> None:
    for seed in range(150):
        random_ = random.Random(seed)
        num_requests, num_servers = random_.randrange(1, 25), random_.choice((1, 1, 2, 3, 5, 40))
        arrivals = [random_.randrange(12) for _ in range(num_requests)]
        services = [random_.randrange(6) for _ in range(num_requests)]
        found = serve(np.array(arrivals, float), np.array(services, float), num_servers, backend)  # type: ignore[arg-type]
        assert found.wait_s.tolist() == by_events([*map(float, arrivals)], [*map(float, services)], num_servers)
        assert (found.ttft_s == found.wait_s + services).all()


MODEL, HARDWARE = KvModel.load("llama-3.1-8b"), Hardware.load("peak_tflops=500,mfu=0.4,gpus=2")


def test_row() -> None:
    gaps_ms = [0.0, 5.0, 300.0, 301.0, 302.0, 1000.0]
    trace = make_trace([[0, 1], [0, 1, 2], [0], [3], [0, 1], [3]], 4000, timestamps_ms=gaps_ms)
    hit_tokens = np.array([0, 8000, 4000, 0, 8000, 4000])
    row = serving_row(trace, hit_tokens, MODEL, HARDWARE, num_servers=2, slo_s=0.2, warm_up=1)
    service = compute_s(MODEL, HARDWARE, trace.input_tokens, hit_tokens).tolist()
    uncached = compute_s(MODEL, HARDWARE, trace.input_tokens, 0).tolist()
    arrivals = [gap / 1000 for gap in gaps_ms]
    ttft = sorted(np.add(by_events(arrivals, service, 2), service)[1:])
    without = sorted(np.add(by_events(arrivals, uncached, 2), uncached)[1:])
    assert (row.ttft_p50_s, row.ttft_p50_without_cache_s) == pytest.approx((ttft[2], without[2]))
    assert row.ttft_p95_s == pytest.approx(ttft[3] + 0.8 * (ttft[4] - ttft[3]))
    assert row.ttft_p99_without_cache_s == pytest.approx(without[3] + 0.96 * (without[4] - without[3]))
    assert row.slo_share == sum(seconds <= 0.2 for seconds in ttft) / 5
    assert row.slo_share_without_cache == sum(seconds <= 0.2 for seconds in without) / 5
    assert row.slo_share > row.slo_share_without_cache
    assert row.gpu_s == pytest.approx(2 * sum(service[1:]))
    assert row.gpu_s_saved == pytest.approx(2 * (sum(uncached[1:]) - sum(service[1:])))
    assert row.gpu_s_saved_share == pytest.approx(1 - sum(service[1:]) / sum(uncached[1:]))
    assert row.utilisation == pytest.approx(sum(service[1:]) / (2 * 0.995))
    assert row.utilisation_without_cache == pytest.approx(sum(uncached[1:]) / (2 * 0.995))
    json.dumps(dataclasses.asdict(row), allow_nan=False)


def test_overload_is_told() -> None:
    trace = make_trace([[block] for block in range(50)], 32000, timestamps_ms=[float(at) for at in range(50)])
    row = serving_row(trace, np.zeros(50, np.int64), MODEL, HARDWARE)
    assert row.utilisation is not None and row.utilisation > 10
    assert row.ttft_p99_s > 10 * float(compute_s(MODEL, HARDWARE, 32000, 0))
    assert row.gpu_s_saved == row.gpu_s_saved_share == 0
    assert row.slo_share is None


def test_requests_that_come_at_once_have_no_utilisation() -> None:
    trace = make_trace([[0], [1]], timestamps_ms=[0.0, 0.0])
    row = serving_row(trace, np.zeros(2, np.int64), MODEL, HARDWARE)
    assert row.utilisation is None and row.utilisation_without_cache is None
