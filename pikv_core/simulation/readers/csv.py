"""Logs of single objects as CSV with a line of names: time (s; ms where named so), id and perhaps size, in any order.

Ids may be text: they are then hashed to 64 bits. Sizes are read and not used: every object counts as one block.
"""

from __future__ import annotations

import csv
import hashlib
import math
import re
from array import array
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from pikv_core.errors import PiKVError
from pikv_core.simulation.readers import READERS
from pikv_core.simulation.readers.base import Damaged, Options, Reader, read_lines
from pikv_core.simulation.readers.objects import object_trace
from pikv_core.simulation.readers.records import LIMIT, shown
from pikv_core.simulation.source import Head, Source
from pikv_core.simulation.trace import Trace, dense

NAMES = {
    "time": ("time", "timestamp", "ts", "time_s", "clock_time", "time_ms", "timestamp_ms"),
    "id": ("id", "key", "obj_id", "object_id", "block", "block_id", "hash_id"),
    "size": ("size", "obj_size", "object_size", "size_bytes"),
}
WHOLE = re.compile(r"-?[1-9][0-9]{0,18}|0")
MS_PER_S = 1000


@READERS.register("csv")
@dataclass(frozen=True)
class CSV(Reader):
    shape: ClassVar[str] = "a line of names time (s), id and perhaps size, then one access a line, with commas"

    @staticmethod
    def recognises(head: Head) -> bool:
        return _places(head.line) is not None

    def read(self, source: Source, options: Options) -> Trace:
        hint = f"a csv trace is {self.shape}"
        places = _places(source.head.line)
        if places is None:
            raise PiKVError(f"{source.name}:{source.head.number}: expected the names of the columns", hint=hint)
        time, key = places["time"], places["id"]
        size = places.get("size")
        names = split(source.head.line)
        ms = 1 if names[time].strip().lower().endswith("_ms") else MS_PER_S
        ids, timestamps_ms = array("q"), array("d")

        def take(line: str) -> None:
            fields = split(line)
            if len(fields) != len(names):
                raise Damaged(f"expected {len(names)} fields, got {len(fields)}")
            timestamp = _number(fields[time], "time") * ms
            if size is not None:
                _number(fields[size], "size")
            ids.append(_object(fields[key].strip()))
            timestamps_ms.append(timestamp)

        read_lines(source, options.damage, take, hint, skip_first=True)
        numbers, count = dense(np.frombuffer(ids, np.int64))
        return object_trace(numbers, count, np.frombuffer(timestamps_ms, np.float64))


def split(line: str) -> list[str]:
    """Return the fields of one line; raise Damaged."""
    if '"' not in line:
        return line.rstrip("\r\n").split(",")
    try:
        return next(csv.reader([line], strict=True), [])
    except csv.Error as error:
        raise Damaged(f"not a line of CSV: {str(error).lower()}") from None


def _number(text: str, name: str) -> float:
    """Return a field's number; raise Damaged."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < LIMIT:
        raise Damaged(f"{name}: expected a number from 0 on, got {shown(text)}")
    return value


def _places(line: str) -> dict[str, int] | None:
    """Return where the columns are by what they mean; None for a line that does not name time and id."""
    try:
        names = [name.strip().lower() for name in split(line)]
    except Damaged:
        return None
    places = {
        meaning: names.index(known) for meaning, synonyms in NAMES.items() for known in synonyms[::-1] if known in names
    }
    return places if "time" in places and "id" in places else None


def _object(text: str) -> int:
    """Return the id as a whole number; text is hashed, so that two texts are the same object by chance only."""
    if WHOLE.fullmatch(text):
        value = int(text)
        if -(2**63) <= value < 2**63:
            return value
    elif not text:
        raise Damaged("id: expected the name of an object, got ''")
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)
