"""Reading libCacheSim's records, told by their content alone."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from pikv_core.errors import PiKVError
from pikv_core.simulation.load import load
from pikv_core.simulation.readers.oracle_general import OracleGeneral
from pikv_core.simulation.source import first_head

RECORDS = [(100, 2**64 - 1, 4096, 2), (100, 5, 1, -1), (103, 2**64 - 1, 4096, 2**63 - 1), (110, 0, 0, -1)]


def packed(records: list[tuple[int, int, int, int]]) -> bytes:
    return b"".join(struct.pack("<IQIq", *record) for record in records)


def test_columns(tmp_path: Path) -> None:
    file = tmp_path / "trace.bin"
    file.write_bytes(packed(RECORDS))
    loaded = load(str(file))
    trace = loaded.trace
    assert (loaded.format, trace.is_objects, trace.block_tokens) == ("oracleGeneral", True, 1)
    assert trace.ids.tolist() == [0, 1, 0, 2]
    assert trace.starts.tolist() == [0, 1, 2, 3, 4]
    assert trace.timestamps_ms.tolist() == [0, 0, 3000, 10_000]
    assert trace.input_tokens.tolist() == [1, 1, 1, 1]
    assert trace.output_tokens.tolist() == [0, 0, 0, 0]


def test_a_file_larger_than_a_piece(tmp_path: Path) -> None:
    file = tmp_path / "trace.bin"
    keys = [i * i % 977 for i in range(30_000)]
    file.write_bytes(packed([(i, key, 1, -1) for i, key in enumerate(keys)]))
    seen: dict[int, int] = {}
    assert load(str(file)).trace.ids.tolist() == [seen.setdefault(key, len(seen)) for key in keys]


def test_times_out_of_order_are_sorted(tmp_path: Path) -> None:
    file = tmp_path / "trace.bin"
    ordered = [(i, i % 10, 1, -1) for i in range(3000)]
    file.write_bytes(packed([*ordered, (7, 77, 1, -1)]))
    trace = load(str(file)).trace
    assert trace.timestamps_ms[7:10].tolist() == [7000, 7000, 8000]
    assert trace.ids[7:10].tolist() == [7, 10, 8]


def test_cut_file(tmp_path: Path) -> None:
    file = tmp_path / "trace.bin"
    file.write_bytes(packed(RECORDS)[:-5])
    with pytest.raises(PiKVError, match=r"trace.bin: the file is cut off: 19 bytes follow 3 records of 24 bytes"):
        load(str(file))
    assert load(str(file), skip_bad_lines=True).trace.num_requests == 3


@pytest.mark.parametrize(
    "data",
    [
        b"",
        packed(RECORDS)[:23],
        b"a line of text that is long enough to be some records, more than a few of them\n",
        "UTF-16, which has zeros in between".encode("utf-16"),
        bytes(240),
        bytes(range(240)),
        packed([(5, 1, 1, -1), (4, 1, 1, 2**41)]),
        packed([(5, 1, 1, -2)]),
    ],
)
def test_other_bytes_are_not_taken(data: bytes) -> None:
    assert OracleGeneral.recognises(first_head(data)) is False
