"""Independent accesses whose popularity follows Zipf's law, the trace that general cache simulators are timed on."""

from __future__ import annotations

import numpy as np

from pikv_core.simulation.trace import Trace, columns


def zipf_trace(num_accesses: int, num_objects: int, seed: int = 0) -> Trace:
    """Return single accesses; an object of popularity rank r is drawn with weight 1/r."""
    cumulative = np.cumsum(1 / np.arange(1, num_objects + 1))
    drawn = np.random.default_rng(seed).random(num_accesses) * cumulative[-1]
    return columns(
        np.minimum(np.searchsorted(cumulative, drawn, side="right"), num_objects - 1),
        np.arange(num_accesses + 1),
        np.broadcast_to(np.float64(0), num_accesses),
        np.broadcast_to(np.int64(1), num_accesses),
        np.broadcast_to(np.int64(0), num_accesses),
        block_tokens=1,
        is_objects=True,
    )
