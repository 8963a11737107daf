"""The hits of an infinite cache: no policy and no capacity can have more."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from pikv_core.simulation.compiled import compiled
from pikv_core.simulation.replay import Backend, Semantics
from pikv_core.simulation.trace import Trace


def ceiling_hits(trace: Trace, semantics: Semantics, backend: Backend = "numba") -> int:
    """Return the block hits when nothing is ever evicted."""
    if semantics == "object":
        return trace.ids.size - trace.num_blocks
    count = _compiled_leading() if backend == "numba" else _leading
    return int(count(trace.ids, trace.starts, np.zeros(trace.num_blocks, np.uint8)))


@cache
def _compiled_leading() -> Callable[..., int]:
    return compiled(_leading, "ceiling_leading")


def _leading(ids: Any, starts: Any, seen: Any) -> int:
    """Count the accesses that lead their request with blocks of earlier ones; seen: zeros [U]."""
    hits = 0
    for request in range(starts.size - 1):
        begin, end = starts[request], starts[request + 1]
        leading = begin
        while leading < end and seen[ids[leading]]:
            leading += 1
        hits += leading - begin
        for access in range(leading, end):
            seen[ids[access]] = 1
    return hits
