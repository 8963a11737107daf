"""Reading mooncake jsonl: what is kept, and what is said of a damaged file."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

from pikv_core.errors import PiKVError
from pikv_core.simulation.load import load
from pikv_core.simulation.readers import READERS
from pikv_core.simulation.source import Head, first_head

RECORDS = [
    {"timestamp": 0, "input_length": 1000, "output_length": 7, "hash_ids": [900, 5]},
    {"timestamp": 2.5, "input_length": 1600, "output_length": 8, "hash_ids": [900, 5, -3, 2**62]},
    {"timestamp": 9, "input_length": 1, "output_length": 0, "hash_ids": []},
]
LINES = [json.dumps(record) for record in RECORDS]


def written(folder: Path, text: str | bytes) -> str:
    path = folder / "trace.jsonl"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


@pytest.mark.parametrize(
    "text",
    [
        "\n".join(LINES),
        "\n".join(LINES) + "\n",
        "\n\n" + "\r\n \r\n".join(LINES) + "\n",
        "\ufeff" + "\n".join(LINES),
    ],
)
def test_columns(tmp_path: Path, text: str) -> None:
    trace = load(written(tmp_path, text)).trace
    assert trace.starts.tolist() == [0, 2, 6, 6]
    assert (trace.num_requests, trace.num_blocks, trace.block_tokens) == (3, 4, 512)
    assert trace.ids.dtype.name == "int32"
    first, second = trace.ids[:2].tolist(), trace.ids[2:].tolist()
    assert second[:2] == first
    assert sorted({*first, *second}) == [0, 1, 2, 3]
    assert trace.timestamps_ms.tolist() == [0, 2.5, 9]
    assert trace.input_tokens.tolist() == [1000, 1600, 1]
    assert trace.output_tokens.tolist() == [7, 8, 0]


def test_stdin(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO("\n".join(LINES).encode()))
    monkeypatch.setattr(sys, "stdin", stream)
    assert load("-").trace.num_requests == 3


def changed(**changes: object) -> str:
    return json.dumps({**RECORDS[1], **changes})


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (LINES[1][:-9], "not a whole JSON object"),
        (LINES[1] + "}", "not a whole JSON object"),
        ("[1, 2]", "expected a JSON object"),
        ('{"timestamp": 1}', "input_length: required, but not given"),
        (changed(input_length="9"), "input_length: expected a number of tokens, got '9'"),
        (changed(output_length=-1), "output_length: expected a number of tokens, got -1"),
        (changed(input_length=2**70), "input_length: expected a number of tokens"),
        (changed(timestamp=None), "timestamp: expected milliseconds, got None"),
        (changed(timestamp=float("nan")), "timestamp: expected milliseconds, got nan"),
        (changed(hash_ids=5), "hash_ids: expected a list, got 5"),
        (changed(hash_ids=[1, "a"]), "hash_ids: expected whole numbers of at most 64 bits"),
        (changed(hash_ids=[1.5]), "hash_ids: expected whole numbers of at most 64 bits"),
        (changed(hash_ids=[2**64]), "hash_ids: expected whole numbers of at most 64 bits"),
        (changed(input_length=10**4000), "input_length: expected a number of tokens, got 1000"),
        ("[" * 100_000, "nested too deep for a record of a trace"),
    ],
)
def test_damaged_line(tmp_path: Path, line: str, problem: str) -> None:
    file = written(tmp_path, "\n".join([LINES[0], line, LINES[2]]))
    with pytest.raises(PiKVError) as caught:
        load(file)
    assert caught.value.message.startswith(f"{file}:2: {problem}")
    assert caught.value.hint


def test_every_cut_inside_the_last_record_is_noticed(tmp_path: Path) -> None:
    whole = "\n".join(LINES[:2])
    for cut in range(len(LINES[0]) + 2, len(whole)):
        with pytest.raises(PiKVError, match=r"trace.jsonl:2: not a whole JSON object"):
            load(written(tmp_path, whole[:cut]))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", ": the trace is empty"),
        (b" \n\n", ": the trace is empty"),
        (LINES[2].encode(), ": no request has a block"),
        (b"\ntime,name\n1,2\n", ":2: this line begins no trace of a known format"),
        (b'{"timestamp": 1}', ":1: this line begins no trace of a known format"),
        (b"\0\1\2\3" * 99, ": these bytes begin no trace of a known format"),
        (LINES[0].encode() + b"\n\x1f\x8b\xff", ":2: not UTF-8 text"),
    ],
)
def test_file_that_is_no_trace(tmp_path: Path, content: bytes, problem: str) -> None:
    file = written(tmp_path, content)
    with pytest.raises(PiKVError) as caught:
        load(file)
    assert caught.value.message == file + problem
    assert caught.value.hint


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(PiKVError, match="cannot read the trace: no such file"):
        load(str(tmp_path / "none.jsonl"))
    with pytest.raises(PiKVError, match="cannot read the trace: file name too long"):
        load(str(tmp_path / ("long" * 100)))
    with pytest.raises(PiKVError, match="cannot read the trace: not a directory"):
        load(written(tmp_path, "") + "/inside")
    (tmp_path / "trace.jsonl").unlink()
    with pytest.raises(PiKVError, match="the folder is empty"):
        load(str(tmp_path))
    (tmp_path / "readme.txt").write_text("nothing to read")
    with pytest.raises(PiKVError, match="none of the folder's files is of a known format"):
        load(str(tmp_path))


@pytest.mark.parametrize("reader", READERS.names())
def test_a_reader_says_what_it_reads_and_recognises_no_other_text(reader: str) -> None:
    assert READERS[reader].shape
    assert READERS[reader].recognises(first_head(b"once upon a time")) is False
    assert READERS[reader].recognises(Head(files=("LICENSE",))) is False
