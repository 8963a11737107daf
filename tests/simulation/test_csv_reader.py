"""Reading CSV: accesses with named columns, and logs of lengths alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from pikv_core.errors import PiKVError
from pikv_core.simulation.load import load

AZURE = Path(__file__).parents[3] / "shared/traces/AzureLLMInferenceTrace_code.csv"


def written(folder: Path, text: str) -> str:
    path = folder / "log.csv"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    "text",
    [
        "time,id\n10,7\n10.5,-3\n11,7\n",
        "ID,Size,Timestamp\r\n7,100,10\r\n-3,5,10.5\r\n7,100,11\r\n",
        "time_ms, key ,note\n10000,7,a\n10500,-3,\n11000,7,c",
        '"obj_id","clock_time"\n"a,b",10\nother,10.5\n"a,b",11\n',
        "object_id,ts\n07,10\n7,10.5\n07,11\n",
        "id,time\n99999999999999999999,10\n99999999999999999998,10.5\n99999999999999999999,11\n",
    ],
)
def test_accesses(tmp_path: Path, text: str) -> None:
    loaded = load(written(tmp_path, text))
    trace = loaded.trace
    assert (loaded.format, trace.is_objects, trace.block_tokens, trace.num_blocks) == ("csv", True, 1, 2)
    assert trace.ids.tolist() == [0, 1, 0]
    assert trace.timestamps_ms.tolist() == [0, 500, 1000]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("5", "expected 3 fields, got 1"),
        ("5,6,7,8", "expected 3 fields, got 4"),
        ("soon,6,7", "time: expected a number from 0 on, got 'soon'"),
        ("nan,6,7", "time: expected a number from 0 on, got 'nan'"),
        ("-1,6,7", "time: expected a number from 0 on, got '-1'"),
        ("1e99,6,7", "time: expected a number from 0 on, got '1e99'"),
        ("5,,7", "id: expected the name of an object, got ''"),
        ("5,6,big", "size: expected a number from 0 on, got 'big'"),
        ('5,"6,7', "not a line of csv"),
    ],
)
def test_damaged_line(tmp_path: Path, line: str, problem: str) -> None:
    file = written(tmp_path, f"time,id,size\n4,6,7\n{line}\n9,6,7\n")
    with pytest.raises(PiKVError) as caught:
        load(file)
    assert caught.value.message.lower().startswith(f"{file}:3: {problem}".lower())
    loaded = load(file, skip_bad_lines=True)
    assert (loaded.trace.num_requests, loaded.skipped_lines) == (2, 1)


def test_names_alone_are_no_trace(tmp_path: Path) -> None:
    with pytest.raises(PiKVError, match=r"log.csv: the trace has no request"):
        load(written(tmp_path, "time,id\n"))


def test_lengths_alone(tmp_path: Path) -> None:
    file = written(
        tmp_path,
        "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
        "2023-11-16 18:17:03.9799600,4808,10\r\n"
        "2023-11-16 18:17:04.0319600,3180,8\r\n"
        "2023-11-16 18:17:04.9799600+00:00,1,0",
    )
    loaded = load(file)
    trace = loaded.trace
    assert (loaded.format, trace.num_requests, trace.ids.size, trace.num_blocks) == ("azure", 3, 0, 0)
    assert trace.starts.tolist() == [0, 0, 0, 0]
    assert trace.timestamps_ms.tolist() == pytest.approx([0, 52, 1000], abs=0.001)
    assert trace.input_tokens.tolist() == [4808, 3180, 1]
    assert trace.output_tokens.tolist() == [10, 8, 0]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("yesterday,1,2", "TIMESTAMP: expected a date and time, got 'yesterday'"),
        ("2023-11-16 18:17:04,x,2", "ContextTokens: expected a number of tokens, got 'x'"),
        ("2023-11-16 18:17:04,1,-2", "GeneratedTokens: expected a number of tokens, got '-2'"),
        ("2023-11-16 18:17:04,1", "expected 3 fields, got 2"),
    ],
)
def test_damaged_lengths(tmp_path: Path, line: str, problem: str) -> None:
    file = written(tmp_path, f"TIMESTAMP,ContextTokens,GeneratedTokens\n{line}\n")
    with pytest.raises(PiKVError) as caught:
        load(file)
    assert caught.value.message == f"{file}:2: {problem}"


def test_the_published_log_of_lengths() -> None:
    if not AZURE.is_file():
        pytest.skip("the Azure log is not here")
    trace = load(str(AZURE)).trace
    assert (trace.num_requests, trace.ids.size) == (8819, 0)
