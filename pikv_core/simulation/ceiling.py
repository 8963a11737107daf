"""The hits of an infinite cache: no policy and no capacity can have more."""

from __future__ import annotations

import numpy as np

from pikv_core.simulation.replay import Semantics
from pikv_core.simulation.trace import Trace


def ceiling_hits(trace: Trace, semantics: Semantics) -> int:
    """Return the block hits when nothing is ever evicted."""
    if semantics == "object":
        return trace.ids.size - trace.num_blocks
    request = np.repeat(np.arange(trace.num_requests), trace.blocks_per_request)
    first_request = np.full(trace.num_blocks, trace.num_requests)
    np.minimum.at(first_request, trace.ids, request)
    position = np.arange(trace.ids.size) - trace.starts[request]
    leading = trace.blocks_per_request.copy()
    new = first_request[trace.ids] == request
    np.minimum.at(leading, request[new], position[new])
    return int(leading.sum())
