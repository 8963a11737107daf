"""oracleGeneral out and in again: the same accesses, times and next accesses."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from pikv_core.errors import PiKVError
from pikv_core.simulation.export import export_oracle_general
from pikv_core.simulation.load import load
from pikv_core.simulation.trace import Trace, make_trace


def random_trace(num_requests: int) -> Trace:
    random = np.random.default_rng(3)
    requests = [random.integers(0, 50, random.integers(0, 9)).tolist() for _ in range(num_requests)]
    return make_trace(requests, timestamps_ms=[0, *np.sort(random.uniform(0, 90_000, num_requests - 1))])


def test_records(tmp_path: Path) -> None:
    trace = make_trace([[7, 5], [], [7], [5, 7, 9]], timestamps_ms=[0, 1000, 2999, 61_500])
    export_oracle_general(trace, tmp_path / "out.oracleGeneral")
    data = (tmp_path / "out.oracleGeneral").read_bytes()
    assert list(struct.iter_unpack("<IQIq", data)) == [
        (0, 0, 1, 2),
        (0, 1, 1, 3),
        (2, 0, 1, 4),
        (61, 1, 1, -1),
        (61, 0, 1, -1),
        (61, 2, 1, -1),
    ]


def test_reading_it_back_gives_the_same_accesses(tmp_path: Path) -> None:
    trace = random_trace(300)
    export_oracle_general(trace, tmp_path / "out.bin")
    loaded = load(str(tmp_path / "out.bin"))
    assert (loaded.format, loaded.trace.is_objects, loaded.trace.block_tokens) == ("oracleGeneral", True, 1)
    assert loaded.trace.ids.tolist() == trace.ids.tolist()
    assert loaded.trace.num_blocks == trace.num_blocks
    seconds = trace.timestamps_ms[trace.request_of_access] // 1000
    assert loaded.trace.timestamps_ms.tolist() == (1000 * (seconds - seconds[0])).tolist()


def test_what_cannot_be_exported(tmp_path: Path) -> None:
    with pytest.raises(PiKVError, match="no accesses to export"):
        export_oracle_general(make_trace([[], []]), tmp_path / "out.bin")
    with pytest.raises(PiKVError, match="do not fit the 32 bits"):
        export_oracle_general(make_trace([[1], [1]], timestamps_ms=[0, 5e12]), tmp_path / "out.bin")
    assert not list(tmp_path.iterdir())
