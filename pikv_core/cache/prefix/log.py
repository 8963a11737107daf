"""The log of requests to a prefix store: what its policy's state is rebuilt from, and `pikv simulate-cache` replays.

One line a request, in the shape `blocks`: the ids of the prompt's whole blocks, when it came, its tokens. `check` is a
hash over the line and those before it, so that a changed, missing or added line is found. A line that was cut off by
a kill is a request that was not finished, and is taken away.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from pikv_core.errors import PiKVError
from pikv_core.simulation.online import Request

REQUESTS = "requests.jsonl"
CHECK_DIGITS = 16


class RequestLog:
    """Append requests to the log of a folder, after reading what is there: `requests`."""

    def __init__(self, folder: Path, block_tokens: int):
        self.path = folder / REQUESTS
        self._block_tokens = block_tokens
        self._check = ""
        self.requests: list[Request] = []
        try:
            data = self.path.read_bytes() if self.path.exists() else b""
            whole = data.rfind(b"\n") + 1
            for number, line in enumerate(data[:whole].splitlines(), 1):
                self.requests.append(self._read(line, number))
            self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            if whole < len(data):
                os.ftruncate(self._file, whole)
        except OSError as error:
            raise PiKVError(f"{self.path}: {error.strerror or error}", hint="give another folder") from error
        self.num_bytes = whole

    def append(self, request: Request) -> None:
        """Write a request as a whole, behind the others."""
        record = {
            "timestamp": round(request.timestamp_ms),
            "input_length": request.input_tokens,
            "output_length": request.output_tokens,
            "hash_ids": list(request.ids),
            "block_size": self._block_tokens,
        }
        check = _check(self._check, record)
        line = json.dumps({**record, "check": check}).encode() + b"\n"
        try:
            if os.write(self._file, line) < len(line):
                os.ftruncate(self._file, self.num_bytes)
                raise PiKVError(f"{self.path}: the disk is full", hint="what was stored before is intact")
        except OSError as error:
            raise PiKVError(
                f"{self.path}: cannot be written: {error.strerror or error}", hint="what was stored before is intact"
            ) from error
        self._check, self.num_bytes = check, self.num_bytes + len(line)
        self.requests.append(request)

    def close(self) -> None:
        os.close(self._file)

    def _read(self, line: bytes, number: int) -> Request:
        try:
            record = json.loads(line)
            check = record.pop("check")
            if check != _check(self._check, record):
                raise ValueError
            self._check = check
            return Request(record["hash_ids"], record["timestamp"], record["input_length"], record["output_length"])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise PiKVError(
                f"{self.path}:{number}: damaged: it is not the line that was written here",
                hint="what the store holds follows from this log: remove the store's folder, and it fills anew",
            ) from error


def _check(before: str, record: dict[str, Any]) -> str:
    return hashlib.sha256(f"{before}\n{json.dumps(record)}".encode()).hexdigest()[:CHECK_DIGITS]
