"""libCacheSim's oracleGeneral: packed records of 24 bytes, little-endian, of time, object, size and next access.

Sizes are read and not used: every object counts as one block. The next access is found anew when it is needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from pikv_core.simulation.factorize import Numbering
from pikv_core.simulation.readers import READERS
from pikv_core.simulation.readers.base import Damage, Options, Reader
from pikv_core.simulation.readers.objects import object_trace
from pikv_core.simulation.source import Head, Source
from pikv_core.simulation.trace import Trace

RECORD = np.dtype([("time_s", "<u4"), ("id", "<u8"), ("size", "<u4"), ("next", "<i8")])
NEVER = -1  # next access; some writers put the greatest int64
PLAUSIBLE_ACCESSES = 2**40
MS_PER_S = 1000


@READERS.register("oracleGeneral")
@dataclass(frozen=True)
class OracleGeneral(Reader):
    shape: ClassVar[str] = "libCacheSim's 24-byte records: u4 time (s), u8 id, u4 size, i8 next access or -1"
    is_slow: ClassVar[bool] = False

    @staticmethod
    def recognises(head: Head) -> bool:
        """Take bytes whose next accesses are all -1 or an index within the longest of logs: no text's are."""
        records = np.frombuffer(head.start[: len(head.start) // RECORD.itemsize * RECORD.itemsize], RECORD)
        later = records["next"]
        ends = (later == NEVER) | (later == np.iinfo(np.int64).max)
        ahead = (later > 0) & (later < PLAUSIBLE_ACCESSES)
        return records.size > 0 and bool((ends | ahead).all())

    def read(self, source: Source, options: Options) -> Trace:
        """Number the objects piece by piece, so that the records are never held together."""
        numbering = Numbering()
        ids: list[NDArray[np.int32]] = []
        times: list[NDArray[Any]] = []
        for records in _records(source, options.damage):
            ids.append(numbering.number(np.ascontiguousarray(records["id"]).view(np.int64)))
            times.append(np.ascontiguousarray(records["time_s"]))
        timestamps_ms = np.concatenate(times, dtype=np.float64) if times else np.zeros(0)
        timestamps_ms *= MS_PER_S
        times.clear()
        return object_trace(np.concatenate(ids) if ids else np.zeros(0, np.int32), numbering.count, timestamps_ms)


def _records(source: Source, damage: Damage) -> Iterator[NDArray[Any]]:
    """Yield the records in pieces; a last one that is cut off is damage."""
    rest = b""
    num_records = 0
    for chunk in source.chunks():
        held = rest + chunk
        whole = len(held) // RECORD.itemsize
        num_records += whole
        rest = held[whole * RECORD.itemsize :]
        if whole:
            yield np.frombuffer(held, RECORD, whole)
    if rest:
        problem = f"the file is cut off: {len(rest)} bytes follow {num_records:,} records of 24 bytes"
        damage.take(source.name, problem, "fetch the file again")
