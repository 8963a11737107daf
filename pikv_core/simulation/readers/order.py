"""Put a log's requests in order of time, from 0 on."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pikv_core.simulation.trace import ROOT, Trace


def by_time(trace: Trace) -> Trace:
    """Return the trace sorted by time, requests at the same time in the log's order, its first request at 0.

    A parent that comes after its child is no turn before it: the child then has none.
    """
    times = trace.timestamps_ms
    if times.size and bool((times[1:] < times[:-1]).any()):
        trace = _reordered(trace, np.argsort(times, kind="stable"))
        times = trace.timestamps_ms
    if times.size and times[0] != 0:
        trace = dataclasses.replace(trace, timestamps_ms=times - times[0])
    earlier = trace.parent < np.arange(trace.num_requests) if trace.parent.strides != (0,) else None
    if earlier is not None and not earlier.all():
        trace = dataclasses.replace(trace, parent=np.where(earlier, trace.parent, ROOT))
    return trace


def _reordered(trace: Trace, order: NDArray[np.int64]) -> Trace:
    """Return the trace with request order[r] as its request r."""
    starts = np.zeros_like(trace.starts)
    np.cumsum(trace.blocks_per_request[order], out=starts[1:])
    # where each access was: as far behind its request's first as it is now
    was = np.repeat(trace.starts[:-1][order] - starts[:-1], np.diff(starts))
    was += np.arange(was.size)
    place = np.empty_like(order)
    place[order] = np.arange(order.size)
    parent = _taken(trace.parent, order)
    return dataclasses.replace(
        trace,
        ids=trace.ids[was],
        starts=starts,
        timestamps_ms=trace.timestamps_ms[order],
        input_tokens=_taken(trace.input_tokens, order),
        output_tokens=_taken(trace.output_tokens, order),
        category=_taken(trace.category, order),
        turn=_taken(trace.turn, order),
        parent=parent if parent is trace.parent else np.where(parent == ROOT, ROOT, place[parent]),
    )


def _taken(column: NDArray[Any], order: NDArray[np.int64]) -> NDArray[Any]:
    """Return the column in another order; a view of one value stays one."""
    return column if column.strides == (0,) else column[order]
