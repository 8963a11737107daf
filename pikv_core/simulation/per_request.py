"""What each request found under each policy, as a table in a parquet or csv file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pikv_core.errors import UsageError
from pikv_core.files import replacing
from pikv_core.simulation.trace import Trace

SUFFIXES = (".parquet", ".csv")


class Write(Protocol):
    def __call__(self, of: Mapping[str, str | int], found: Mapping[str, NDArray[Any]]) -> None: ...


def check_name(path: str) -> None:
    """Raise UsageError where the name does not tell a format."""
    if Path(path).suffix not in SUFFIXES:
        raise UsageError(
            f"per_request: expected a file ending in {' or '.join(SUFFIXES)}, got '{path}'",
            hint="for example --per-request requests.parquet",
        )


@contextmanager
def per_request(path: str, trace: Trace) -> Iterator[Write]:
    """Yield what adds a replay's requests to the file, which is there at the end, whole.

    A row is a request in a replay: `of` says which, and `found` are its columns [R] beside those of the trace.
    """
    import pyarrow as pa
    from pyarrow import csv, parquet

    told = {
        "request": np.arange(trace.num_requests),
        "timestamp_s": trace.timestamps_ms / 1000,
        "input_tokens": trace.input_tokens,
        "output_tokens": trace.output_tokens,
        "blocks": trace.blocks_per_request,
        "turn": trace.turn,
    }
    category = np.array(trace.categories)[trace.category]
    with replacing(path) as temporary:
        writer: Any = None

        def write(of: Mapping[str, str | int], found: Mapping[str, NDArray[Any]]) -> None:
            nonlocal writer
            R = trace.num_requests
            columns = {
                **{name: np.full(R, value) for name, value in of.items()},
                **told,
                "category": category,
                **found,
            }
            table = pa.table({name: pa.array(column) for name, column in columns.items()})
            if writer is None:
                kind = parquet.ParquetWriter if path.endswith(".parquet") else csv.CSVWriter
                writer = kind(temporary, table.schema)
            writer.write_table(table)

        try:
            yield write
        finally:
            if writer is not None:
                writer.close()
