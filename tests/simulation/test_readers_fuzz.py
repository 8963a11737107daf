"""Broken logs of every line format: the outcome is a trace or one clear error that names the line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pikv_core.errors import PiKVError
from pikv_core.simulation.load import load

JSON = {
    "mooncake": {"timestamp": 3, "input_length": 1000, "output_length": 7, "hash_ids": [1, 2]},
    "bailian": {
        "chat_id": 2,
        "parent_chat_id": 1,
        "timestamp": 3.5,
        "input_length": 30,
        "output_length": 7,
        "type": "text",
        "turn": 2,
        "hash_ids": [1, 2],
    },
    "blocks": {
        "timestamp": 3,
        "input_length": 30,
        "output_length": 7,
        "hash_ids": [1, 2],
        "block_size": 16,
        "block_tokens": [16, 14],
    },
}
CSV = {
    "csv": ("time,id,size", "5,7,100"),
    "azure": ("TIMESTAMP,ContextTokens,GeneratedTokens", "2023-11-16 18:17:03.9799600,4808,10"),
}
ODD: list[Any] = [
    None,
    True,
    -1,
    0,
    2**31,
    2**62,
    2**63 - 1,
    -(2**63),
    2**63,
    2**64,
    10**400,
    1e308,
    -1e308,
    float("nan"),
    float("inf"),
    "",
    "7",
    "\ud800",
    [],
    {},
    [[]],
    [1, None],
    [1.5],
    [2**63],
    [True, False],
    {"hash_ids": []},
    [0] * 300,
]
SNIPPETS = [
    b"\0",
    b"\n",
    b"\r",
    b"\xff",
    b"\xef\xbb\xbf",
    b'"',
    b"{",
    b"}",
    b"[" * 5000,
    b",",
    b"NaN",
    b"-",
    b"1" * 5000,
    b"\x1f\x8b",
]
QUICK = settings(
    max_examples=80,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@st.composite
def odd_records(draw: st.DrawFn, record: dict[str, Any]) -> bytes:
    """Draw lines of which one has odd fields, lacks some or is no object."""
    odd: Any = dict(record)
    for key in draw(st.lists(st.sampled_from(list(record)), max_size=3)):
        if draw(st.booleans()):
            odd[key] = draw(st.sampled_from(ODD))
        else:
            odd.pop(key, None)
    if draw(st.integers(0, 9)) == 0:
        odd = draw(st.sampled_from(ODD))
    lines = [json.dumps(record)] * draw(st.integers(0, 2)) + [json.dumps(odd)] + [json.dumps(record)]
    return "\n".join(lines).encode()


@st.composite
def odd_rows(draw: st.DrawFn, names: str, row: str) -> bytes:
    """Draw a CSV of which one row has odd fields, too few or too many."""
    fields: list[str] = row.split(",")
    for place in draw(st.lists(st.integers(0, len(fields) - 1), max_size=2)):
        fields[place] = draw(st.sampled_from([str(value) for value in ODD if value != "\ud800"]) | st.text(max_size=9))
    fields = fields[: draw(st.integers(1, 4))] + draw(st.lists(st.just("1"), max_size=1))
    return "\n".join([names, row, ",".join(fields), row]).encode("utf-8", "surrogatepass")


@st.composite
def damaged_bytes(draw: st.DrawFn, whole: bytes) -> bytes:
    """Draw the file cut, with bytes flipped, and with pieces put in or taken out."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(0, len(data) - 1)))
        match draw(st.integers(0, 3)):
            case 0:
                del data[place:]
            case 1 if data:
                data[place] ^= draw(st.integers(1, 255))
            case 2:
                data[place:place] = draw(st.sampled_from(SNIPPETS))
            case _:
                del data[place : place + draw(st.integers(1, 30))]
    return bytes(data)


def broken(format: str) -> st.SearchStrategy[bytes]:
    if format in JSON:
        whole = "\n".join([json.dumps(JSON[format])] * 3).encode()
        return odd_records(JSON[format]) | damaged_bytes(whole)
    names, row = CSV[format]
    return odd_rows(names, row) | damaged_bytes("\n".join([names, row, row]).encode())


def outcome(folder: Path, data: bytes) -> None:
    """Load the bytes with and without skipping; anything but a sound trace or a clear error fails."""
    file = folder / "trace.log"
    file.write_bytes(data)
    for skip in (False, True):
        try:
            trace = load(str(file), skip_bad_lines=skip).trace
        except PiKVError as error:
            assert error.message.startswith(str(file))
            assert len(error.message) < 1000 + len(str(file))
            about_all = "empty|unpack|no request|bytes begin|cut off|lines are damaged|recorded attention"
            assert re.match(r":\d+: \S", error.message.removeprefix(str(file))) or re.search(about_all, error.message)
            assert error.hint
            continue
        assert trace.num_requests >= 1
        assert trace.starts[-1] == trace.ids.size
        assert trace.timestamps_ms[0] == 0
        assert (trace.timestamps_ms[1:] >= trace.timestamps_ms[:-1]).all()
        assert trace.input_tokens.min() >= 0
        assert trace.output_tokens.min() >= 0
        assert trace.ids.size == 0 or (trace.ids.min() >= 0 and trace.ids.max() == trace.num_blocks - 1)
        assert len(trace.category) == len(trace.turn) == len(trace.parent) == trace.num_requests


@pytest.mark.parametrize("format", [*JSON, *CSV])
def test_broken_logs(tmp_path: Path, format: str) -> None:
    @QUICK
    @given(data=broken(format))
    def check(data: bytes) -> None:
        outcome(tmp_path, data)

    check()


@pytest.mark.slow
@pytest.mark.parametrize("format", [*JSON, *CSV])
def test_ten_thousand_broken_logs(tmp_path: Path, format: str) -> None:
    @settings(QUICK, max_examples=2000)
    @given(data=broken(format))
    def check(data: bytes) -> None:
        outcome(tmp_path, data)

    check()


@QUICK
@given(data=st.binary(max_size=200))
@example(data=b"\x1f\x8b")
@example(data=b"\x28\xb5\x2f\xfd")
@example(data=b"\xef\xbb\xbf")
@example(data=b"\xff\xfe" + "time,id\n1,2\n".encode("utf-16-le"))
@example(data=b"time,id\r1,2\r")
@example(data=b"[" * 200_000)
@example(data=b'{"hash_ids":' * 50_000)
@example(data=b'{"hash_ids": [' + b"9" * 100_000 + b"]}")
def test_any_bytes(tmp_path: Path, data: bytes) -> None:
    outcome(tmp_path, data)
