"""A log of single objects as a trace: one access per request, and no prompts."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pikv_core.simulation.readers.order import by_time
from pikv_core.simulation.trace import ROOT, Trace


def object_trace(ids: NDArray[np.int32], num_blocks: int, timestamps_ms: NDArray[np.float64]) -> Trace:
    """Return the accesses in order of time; every object counts as one block of one token."""
    R = ids.size
    return by_time(
        Trace(
            ids=ids,
            starts=np.arange(R + 1),
            timestamps_ms=timestamps_ms,
            input_tokens=np.broadcast_to(np.int64(1), R),
            output_tokens=np.broadcast_to(np.int64(0), R),
            block_tokens=1,
            num_blocks=num_blocks,
            category=np.broadcast_to(np.int16(0), R),
            turn=np.broadcast_to(np.int32(0), R),
            parent=np.broadcast_to(np.int64(ROOT), R),
            is_objects=True,
        )
    )
