"""The hits of an infinite cache: no policy and no capacity can have more."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from pikv_core.simulation.compiled import compiled
from pikv_core.simulation.replay import Backend, Semantics
from pikv_core.simulation.trace import Trace


def ceiling_hits(trace: Trace, semantics: Semantics, backend: Backend = "numba", warm_up: int = 0) -> int:
    """Return the block hits when nothing is ever evicted; warm_up: requests whose hits are not counted."""
    count = _compiled_count() if backend == "numba" else _count
    return int(count(trace.ids, trace.starts, np.zeros(trace.num_blocks, np.uint8), semantics == "prefix", warm_up))


@cache
def _compiled_count() -> Callable[..., int]:
    return compiled(_count, "ceiling")


def _count(ids: Any, starts: Any, seen: Any, prefix: bool, warm_up: int) -> int:
    """Count the accesses to blocks that came before; of prefix hits, those that lead their request. seen: zeros [U]."""
    hits = 0
    for request in range(starts.size - 1):
        begin, end = starts[request], starts[request + 1]
        before = hits
        leading = begin
        while leading < end and seen[ids[leading]]:
            leading += 1
        hits += leading - begin
        for access in range(leading, end):
            hits += seen[ids[access]] and not prefix
            seen[ids[access]] = 1
        if request < warm_up:
            hits = before
    return hits
