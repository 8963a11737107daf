"""What the formats with one JSON object a line share: taking a line apart, checking its fields, gathering requests."""

from __future__ import annotations

import json
import math
from array import array
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pikv_core.simulation.readers.base import Damaged
from pikv_core.simulation.readers.order import by_time
from pikv_core.simulation.trace import Trace, columns

LIMIT = 2**62  # of lengths and times


def record_of(line: str, keys: tuple[str, ...]) -> dict[str, Any]:
    """Return the line's object, which has these keys; raise Damaged."""
    try:
        record = json.loads(line)
    except RecursionError:
        raise Damaged("nested too deep for a record of a trace") from None
    except ValueError as error:
        raise Damaged(f"not a whole JSON object: {str(error).lower()}") from None
    if not isinstance(record, dict):
        raise Damaged("expected a JSON object")
    for key in keys:
        if key not in record:
            raise Damaged(f"{key}: required, but not given")
    return record


def tokens(record: dict[str, Any], key: str) -> int:
    """Return a number of tokens; raise Damaged."""
    value = record[key]
    if type(value) is not int or not 0 <= value < LIMIT:
        raise Damaged(f"{key}: expected a number of tokens, got {shown(value)}")
    return value


def moment(record: dict[str, Any], key: str, unit: str) -> float:
    """Return a time in its own unit; raise Damaged."""
    value = record[key]
    if type(value) not in (int, float) or not abs(value) < LIMIT or not math.isfinite(value):
        raise Damaged(f"{key}: expected {unit}, got {shown(value)}")
    return value


def block_ids(record: dict[str, Any]) -> array[int]:
    """Return the record's `hash_ids`; raise Damaged."""
    listed = record["hash_ids"]
    if not isinstance(listed, list):
        raise Damaged(f"hash_ids: expected a list, got {shown(listed)}")
    try:
        return array("q", listed)
    except (TypeError, OverflowError):
        raise Damaged("hash_ids: expected whole numbers of at most 64 bits") from None


def shown(value: Any) -> str:
    """Return the value for a message, cut short."""
    try:
        text = repr(value)
    except ValueError:  # a whole number of thousands of digits
        return "a number too long to show"
    return text if len(text) <= 60 else f"{text[:57]}..."


@dataclass
class Requests:
    """The requests of a log so far, as columns."""

    ids: array[int] = field(default_factory=lambda: array("q"))
    sizes: array[int] = field(default_factory=lambda: array("q"))
    timestamps_ms: array[float] = field(default_factory=lambda: array("d"))
    input_tokens: array[int] = field(default_factory=lambda: array("q"))
    output_tokens: array[int] = field(default_factory=lambda: array("q"))

    def add(self, ids: array[int], timestamp_ms: float, input_tokens: int, output_tokens: int) -> None:
        self.ids.extend(ids)
        self.sizes.append(len(ids))
        self.timestamps_ms.append(timestamp_ms)
        self.input_tokens.append(input_tokens)
        self.output_tokens.append(output_tokens)

    def trace(self, block_tokens: int, **told: Any) -> Trace:
        """Return them in order of time; told: what else the log tells, see trace.columns."""
        starts = np.zeros(len(self.sizes) + 1, np.int64)
        np.cumsum(np.frombuffer(self.sizes, np.int64), out=starts[1:])
        return by_time(
            columns(
                np.frombuffer(self.ids, np.int64),
                starts,
                np.frombuffer(self.timestamps_ms, np.float64),
                np.frombuffer(self.input_tokens, np.int64),
                np.frombuffer(self.output_tokens, np.int64),
                block_tokens,
                **told,
            )
        )
