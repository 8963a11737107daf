"""Load a trace: the first line of the file tells which reader it is for."""

from __future__ import annotations

import sys
from pathlib import Path

from pikv_core.errors import PiKVError
from pikv_core.simulation.readers import READERS
from pikv_core.simulation.trace import Trace


def load(trace: str) -> Trace:
    """Read a trace file, `-` being stdin; raise PiKVError with file and line where it cannot be read."""
    name = "stdin" if trace == "-" else trace
    text = _decoded(sys.stdin.buffer.read() if trace == "-" else _bytes(Path(trace)), name)
    number, first_line = next(
        ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()), (1, "")
    )
    if not first_line:
        raise PiKVError(f"{name}: the trace is empty", hint=_formats())
    for reader in (READERS[known] for known in READERS.names()):
        if reader.recognises(first_line):
            loaded: Trace = reader().read(name, text)
            if not loaded.ids.size:
                raise PiKVError(f"{name}: no request has a block", hint=_formats())
            return loaded
    raise PiKVError(f"{name}:{number}: this line begins no trace of a known format", hint=_formats())


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else error.strerror or str(error)
        raise PiKVError(
            f"{path}: cannot read the trace: {reason.lower()}",
            hint="`pikv gen-data requests --out DIR` writes one; - reads stdin",
        ) from error


def _decoded(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise PiKVError(f"{name}:{line}: not UTF-8 text", hint="unpack a compressed trace first") from error


def _formats() -> str:
    return "known formats: " + "; ".join(f"{name}: {READERS[name].shape}" for name in READERS.names())
