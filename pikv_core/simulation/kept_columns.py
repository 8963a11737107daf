"""A parsed trace kept beside its source, as `.NAME.pikv-columns.zst`, for the next time.

One zstd stream with its checksum: a line of JSON, then the bytes of each column. It is read again only for the very
bytes it was parsed from (SHA-256) and by the very readers that parsed it; anything else is parsed anew. Folders, stdin
and sessions are not kept: what they load as depends on more than one file's bytes.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pikv_core.errors import PiKVError
from pikv_core.files import replacing, sha256
from pikv_core.simulation.trace import ROOT, Trace

LEVEL = 1
HEADER_BYTES_MAX = 1 << 20
DTYPES = {
    "ids": np.int32,
    "blocks_per_request": np.int64,
    "timestamps_ms": np.float64,
    "input_tokens": np.int64,
    "output_tokens": np.int64,
    "category": np.int16,
    "turn": np.int32,
    "parent": np.int64,
}
SINGLE = ("block_tokens", "num_blocks", "categories", "is_objects")


@dataclass(frozen=True)
class Kept:
    format: str
    trace: Trace


def place(source: Path) -> Path:
    """Return where a source's columns are kept."""
    return source.with_name(f".{source.name}.pikv-columns.zst")


def kept(source: Path) -> Kept | None:
    """Return what is kept for the source as it is now; None where there is nothing, or nothing to be trusted."""
    from zstandard import ZstdDecompressor, ZstdError

    try:
        with open(place(source), "rb") as file, ZstdDecompressor().stream_reader(file) as stream:
            told = json.loads(_line(stream))
            if told["parsed_by"] != readers_digest() or told["source"] != sha256(source):
                return None
            arrays = {name: _column(stream, told["lengths"][name], dtype) for name, dtype in DTYPES.items()}
            if stream.read(1):
                return None
        return Kept(told["format"], _trace(told, arrays))
    except (OSError, ZstdError, ValueError, KeyError, TypeError, RecursionError):
        return None


def keep(source: Path, name: str, trace: Trace) -> None:
    """Write the columns beside the source; a folder that cannot be written is no error: nothing is kept."""
    from zstandard import ZstdCompressor

    columns: dict[str, NDArray[Any]] = {name: getattr(trace, name) for name in DTYPES}
    stored = {name: _stored(column) for name, column in columns.items()}
    told = {
        "parsed_by": readers_digest(),
        "format": name,
        "lengths": {name: [column.size, stored[name].size] for name, column in columns.items()},
        **{name: getattr(trace, name) for name in SINGLE},
    }
    try:
        told["source"] = sha256(source)
        with (
            replacing(place(source)) as temporary,
            open(temporary, "wb") as file,
            ZstdCompressor(LEVEL, write_checksum=True).stream_writer(file) as stream,
        ):
            stream.write(json.dumps(told).encode() + b"\n")
            for column in stored.values():
                stream.write(column.view(np.uint8).data)
    except (PiKVError, OSError):
        return


@cache
def readers_digest() -> str:
    """Return the digest of the source text that parses: what was parsed by other text is not trusted."""
    files = [Path(__file__), Path(__file__).with_name("trace.py"), *(Path(__file__).parent / "readers").glob("*.py")]
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(files))).hexdigest()


def _stored(column: NDArray[Any]) -> NDArray[Any]:
    """Return what is written of a column: one value of a view of one value, and of equal counts."""
    is_one = column.strides == (0,) or (column.dtype == np.int64 and bool((column == column[:1]).all()))
    return column[:1].copy() if is_one else np.ascontiguousarray(column)


def _line(stream: Any) -> bytes:
    line = b""
    while not line.endswith(b"\n") and len(line) < HEADER_BYTES_MAX:
        byte = stream.read(1)
        if not byte:
            raise ValueError("no line")
        line += byte
    return line


def _column(stream: Any, lengths: list[int], dtype: Any) -> NDArray[Any]:
    length, stored = lengths
    column = np.empty(stored, dtype)
    left = column.view(np.uint8)
    while left.size:
        read = stream.readinto(left)
        if not read:
            raise ValueError("cut off")
        left = left[read:]
    return column if stored == length else np.broadcast_to(column[0], length)


def _trace(told: dict[str, Any], arrays: dict[str, Any]) -> Trace:
    """Build the trace; raise ValueError where the columns do not belong together."""
    counts = arrays.pop("blocks_per_request")
    starts = np.zeros(counts.size + 1, np.int64)
    np.cumsum(counts, out=starts[1:])
    single: dict[str, Any] = {name: told[name] for name in SINGLE} | {"categories": tuple(told["categories"])}
    trace = Trace(starts=starts, **arrays, **single)
    R, ids = trace.num_requests, trace.ids
    fits = (
        all(column.shape == (R,) for name, column in arrays.items() if name != "ids")
        and starts[-1] == ids.size
        and counts.min(initial=0) >= 0
        and (not ids.size or (ids.min() >= 0 and ids.max() < trace.num_blocks))
        and (not R or (trace.parent.min() >= ROOT and trace.parent.max() < R))
    )
    if not fits:
        raise ValueError("columns that do not belong together")
    return trace
