"""Write a trace's accesses as libCacheSim's oracleGeneral, so that its numbers can be held against ours."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pikv_core.errors import PiKVError
from pikv_core.files import replacing
from pikv_core.simulation.readers.oracle_general import MS_PER_S, NEVER, RECORD
from pikv_core.simulation.trace import Trace

PIECE = 1 << 20  # accesses
SIZE = 1


def export_oracle_general(trace: Trace, path: str | Path) -> None:
    """Write one record per access, a request's blocks first to last, each with its request's time in whole seconds.

    Objects are the trace's dense block numbers, all of size 1. The next access is its index in the file. Raise
    PiKVError for a trace without accesses and for one that is longer than 32 bits of seconds.
    """
    if not trace.ids.size:
        raise PiKVError(f"{path}: a log of lengths has no accesses to export", hint="leave --export out")
    if trace.timestamps_ms[-1] / MS_PER_S >= 2**32:
        raise PiKVError(
            f"{path}: the trace's {trace.timestamps_ms[-1] / MS_PER_S:,.0f} s do not fit the 32 bits of oracleGeneral",
            hint="check that the log's times are in the unit of its format",
        )
    following = trace.next_accesses
    request = trace.request_of_access
    with replacing(path) as temporary, open(temporary, "wb") as file:
        for first in range(0, trace.ids.size, PIECE):
            piece = slice(first, first + PIECE)
            records = np.empty(trace.ids[piece].size, RECORD)
            records["time_s"] = trace.timestamps_ms[request[piece]] // MS_PER_S
            records["id"] = trace.ids[piece]
            records["size"] = SIZE
            records["next"] = np.where(following[piece] == trace.ids.size, NEVER, following[piece])
            file.write(records.data)
