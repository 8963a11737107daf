"""Prefill servers, first come first served: waiting times and times to first token.

A server works on one prompt at a time and is taken while it loads blocks too. Decoding is not part of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pikv_core.simulation.compiled import compiled


@dataclass(frozen=True)
class Served:
    """Seconds by request: waiting for a server, and from arrival to the first token."""

    wait_s: NDArray[np.float64]  # [R]
    ttft_s: NDArray[np.float64]  # [R]


def serve(
    arrival_s: NDArray[np.float64],
    service_s: NDArray[np.float64],
    num_servers: int,
    backend: Literal["numba", "python"] = "numba",
) -> Served:
    """Give every request, in order of arrival, to the server that is free first; [R] each, in any order."""
    order = np.argsort(arrival_s, kind="stable")
    arrivals, services = np.asarray(arrival_s, np.float64)[order], np.asarray(service_s, np.float64)[order]
    waits = np.zeros(arrivals.size)
    free_s = np.full(min(num_servers, max(1, arrivals.size)), -np.inf)
    (_compiled_queue() if backend == "numba" else _queue)(arrivals, services, free_s, waits)
    wait_s = np.empty_like(waits)
    wait_s[order] = waits
    return Served(wait_s, wait_s + service_s)


@cache
def _compiled_queue() -> Callable[..., None]:
    return compiled(_queue, "serving_queue")


def _queue(arrivals: Any, services: Any, free_s: Any, waits: Any) -> None:
    """Fill in the waits [R]; free_s [G] is a heap of the times at which servers are free, soonest first."""
    for request in range(arrivals.size):
        begin = max(arrivals[request], free_s[0])
        waits[request] = begin - arrivals[request]
        until = begin + services[request]
        place = 0
        while True:
            below = 2 * place + 1
            if below >= free_s.size:
                break
            if below + 1 < free_s.size and free_s[below + 1] < free_s[below]:
                below += 1
            if free_s[below] >= until:
                break
            free_s[place] = free_s[below]
            place = below
        free_s[place] = until
