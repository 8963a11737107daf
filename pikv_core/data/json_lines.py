"""Samples as JSON lines, one object a line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pikv_core.errors import PiKVError
from pikv_core.files import replacing


def write(rows: Iterable[Mapping[str, Any]], path: Path) -> int:
    """Write rows, whole or not at all; return their number."""
    number = 0
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as stream:
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
            number += 1
    return number


def read(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file that `write` made, or raise PiKVError naming it."""
    try:
        with path.open(encoding="utf-8") as stream:
            return [json.loads(line) for line in stream]
    except OSError as error:
        raise PiKVError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise PiKVError(f"{path}: not valid JSON lines: {error}") from error
