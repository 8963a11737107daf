"""The traces of Mooncake (FAST'25): one JSON object a line, ids chained by prefix, 512-token blocks.

The last block of a prompt may be partial and has an id too. A key `block_size` gives another block length.
"""

from __future__ import annotations

import json
import math
from array import array
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from pikv_core.errors import PiKVError
from pikv_core.simulation.readers import READERS
from pikv_core.simulation.trace import Trace, columns

BLOCK_TOKENS = 512
KEYS = ("timestamp", "input_length", "output_length", "hash_ids")


@READERS.register("mooncake")
@dataclass(frozen=True)
class Mooncake:
    shape: ClassVar[str] = "jsonl with timestamp (ms), input_length, output_length (tokens), hash_ids"

    @staticmethod
    def recognises(first_line: str) -> bool:
        return first_line.lstrip().startswith("{") and '"hash_ids"' in first_line and "chat_id" not in first_line

    def read(self, name: str, text: str) -> Trace:
        """Parse the whole text; raise PiKVError naming the first damaged line."""
        ids, sizes, timestamps, inputs, outputs = array("q"), array("q"), array("d"), array("q"), array("q")
        block_tokens: int | None = None
        for number, line in enumerate(text.split("\n"), 1):
            if not line or line.isspace():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise PiKVError(
                    f"{name}:{number}: not a whole JSON object: {str(error).lower()}",
                    hint="the file may be cut off; remove the line or fetch the file again",
                ) from error
            problem = _problem(record, block_tokens)
            if not problem:
                try:
                    ids.extend(record["hash_ids"])
                except (TypeError, OverflowError):
                    problem = "hash_ids: expected whole numbers of at most 64 bits"
            if problem:
                raise PiKVError(f"{name}:{number}: {problem}", hint=f"a mooncake trace is {self.shape}")
            block_tokens = record.get("block_size", BLOCK_TOKENS)
            sizes.append(len(record["hash_ids"]))
            timestamps.append(record["timestamp"])
            inputs.append(record["input_length"])
            outputs.append(record["output_length"])
        assert block_tokens is not None
        starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.array(sizes, np.int64))])
        return columns(
            np.array(ids, np.int64),
            starts,
            np.array(timestamps, np.float64),
            np.array(inputs, np.int64),
            np.array(outputs, np.int64),
            block_tokens,
        )


def _problem(record: Any, block_tokens: int | None) -> str | None:
    if not isinstance(record, dict):
        return "expected a JSON object"
    for key in KEYS:
        if key not in record:
            return f"{key}: required, but not given"
    for key in ("input_length", "output_length"):
        value = record[key]
        if type(value) is not int or not 0 <= value < 2**62:
            return f"{key}: expected a number of tokens, got {value!r}"
    timestamp = record["timestamp"]
    if type(timestamp) not in (int, float) or not math.isfinite(timestamp):
        return f"timestamp: expected milliseconds, got {timestamp!r}"
    if not isinstance(record["hash_ids"], list):
        return f"hash_ids: expected a list, got {record['hash_ids']!r}"
    size = record.get("block_size", BLOCK_TOKENS)
    if type(size) is not int or size < 1:
        return f"block_size: expected a number of tokens of at least 1, got {size!r}"
    if block_tokens not in (None, size):
        return f"block_size: expected {block_tokens} as in the lines before, got {size}"
    return None
