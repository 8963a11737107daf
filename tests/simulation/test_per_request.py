"""The table of single requests is whole, or not there at all."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from pyarrow import csv, parquet

from pikv_core.errors import PiKVError, UsageError
from pikv_core.simulation.per_request import check_name, per_request
from pikv_core.simulation.trace import make_trace

TRACE = make_trace([[0, 1], [], [0]], categories=["chat", "tool", "chat"], timestamps_ms=[0, 500, 1500])


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_a_row_for_each_request_of_each_replay(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / "below" / f"requests.{suffix}"
    with per_request(str(file), TRACE) as write:
        write({"policy": "lru", "capacity_blocks": 2**61}, {"hit_blocks": np.array([0, 0, 1])})
        write({"policy": "s3fifo(small_share=0.2)", "capacity_blocks": 3}, {"hit_blocks": np.array([0, 0, 0])})
        assert not file.exists()
    rows = (parquet.read_table(file) if suffix == "parquet" else csv.read_csv(file)).to_pylist()
    assert [(row["policy"], row["capacity_blocks"]) for row in rows] == [("lru", 2**61)] * 3 + [
        ("s3fifo(small_share=0.2)", 3)
    ] * 3
    assert [row["hit_blocks"] for row in rows] == [0, 0, 1, 0, 0, 0]
    assert [row["blocks"] for row in rows[:3]] == [2, 0, 1]
    assert [row["timestamp_s"] for row in rows[:3]] == [0.0, 0.5, 1.5]
    assert [row["category"] for row in rows[:3]] == ["chat", "tool", "chat"]


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_nothing_is_left_of_a_failure(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"requests.{suffix}"
    file.write_text("before")
    with pytest.raises(ZeroDivisionError), per_request(str(file), TRACE) as write:
        write({"policy": "lru"}, {"hit_blocks": np.array([0, 0, 1])})
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    assert file.read_text() == "before"


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PiKVError, match="cannot create the folder"), per_request(str(tmp_path / "file/x.csv"), TRACE):
        pass

    def refuse(**named: str) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    with pytest.raises(PiKVError, match="cannot be written: Permission denied"):
        per_request(str(tmp_path / "x.csv"), TRACE).__enter__()


def test_the_name_tells_the_format() -> None:
    check_name("a.parquet")
    check_name("b/a.csv")
    for name in ("a.txt", "parquet", "a.csv.gz"):
        with pytest.raises(UsageError, match=r"expected a file ending in \.parquet or \.csv"):
            check_name(name)
