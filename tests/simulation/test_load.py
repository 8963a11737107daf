"""Where a trace's bytes come from, and what is left out of damaged ones."""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import zstandard

from pikv_core.errors import PiKVError, UsageError
from pikv_core.simulation.load import load
from pikv_core.simulation.source import CHUNK_BYTES
from pikv_core.simulation.trace import Trace, make_trace

RECORDS = [
    {"timestamp": 10 * i, "input_length": 512 * (i % 7), "output_length": i, "hash_ids": list(range(i % 7))}
    for i in range(40)
]
TEXT = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
PACKED = {
    "plain": TEXT,
    "gzip": gzip.compress(TEXT),
    "zstd": zstandard.compress(TEXT),
    "zstd of unknown length": zstandard.ZstdCompressor(write_content_size=False).compress(TEXT),
    "two gzip archives": gzip.compress(TEXT[:700]) + gzip.compress(TEXT[700:]),
    "two zstd archives": zstandard.compress(TEXT[:700]) + zstandard.compress(TEXT[700:]),
}


def same(one: Trace, other: Trace) -> bool:
    return all(
        np.array_equal(getattr(one, field.name), getattr(other, field.name)) for field in dataclasses.fields(Trace)
    )


def expected() -> Trace:
    trace = make_trace([list(range(i % 7)) for i in range(40)], timestamps_ms=[10.0 * i for i in range(40)])
    return dataclasses.replace(trace, output_tokens=np.arange(40))


@pytest.mark.parametrize("packing", PACKED)
def test_packed_files_and_stdin(tmp_path: Path, packing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "trace.any"
    file.write_bytes(PACKED[packing])
    assert same(load(str(file)).trace, expected())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(PACKED[packing])))
    assert same(load("-").trace, expected())


@pytest.mark.parametrize("packing", ["gzip", "zstd", "zstd of unknown length"])
def test_cut_archives(tmp_path: Path, packing: str) -> None:
    file = tmp_path / "trace.any"
    whole = PACKED[packing]
    for cut in range(5, len(whole), 7):
        file.write_bytes(whole[:cut])
        with pytest.raises(PiKVError, match=r"trace.any: cannot unpack the trace"):
            load(str(file))


def test_damaged_archive(tmp_path: Path) -> None:
    file = tmp_path / "trace.gz"
    whole = bytearray(PACKED["gzip"])
    whole[60] ^= 255
    file.write_bytes(whole)
    with pytest.raises(PiKVError, match=r"trace.gz: cannot unpack the trace") as caught:
        load(str(file))
    assert caught.value.hint


def test_lines_longer_than_a_chunk(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    ids = list(range(200_000))
    long = {"timestamp": 0, "input_length": 1, "output_length": 1, "hash_ids": ids}
    file.write_text(json.dumps(long) + "\n" + json.dumps({**long, "hash_ids": ids[::-1]}))
    assert file.stat().st_size > 8 * CHUNK_BYTES
    trace = load(str(file), keep_columns=False).trace
    assert trace.ids.tolist() == ids + ids[::-1]


def test_bad_lines_are_counted_and_left_out(tmp_path: Path) -> None:
    lines = TEXT.splitlines()
    bad = [b"{", b'{"timestamp": 1}', b"\xff\xfe", json.dumps({**RECORDS[1], "hash_ids": [1, "x"]}).encode()]
    file = tmp_path / "trace.jsonl"
    file.write_bytes(b"\n".join([bad[0], *lines[:20], *bad[1:], *lines[20:]]))
    said: list[str] = []
    loaded = load(str(file), skip_bad_lines=True, status=said.append)
    assert loaded.skipped_lines == 4
    assert same(loaded.trace, expected())
    assert len(said) == 1
    for part in [f"{file}:1: not a whole", f"{file}:22: input_length", f"{file}:23: not UTF-8", "and 1 more"]:
        assert part in said[0]
    with pytest.raises(PiKVError, match=r"trace.jsonl:1: this line begins no trace"):
        load(str(file))


def test_nothing_but_bad_lines(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text('{"hash_ids": 3}\n{"hash_ids"\n')
    with pytest.raises(PiKVError, match=r"trace.jsonl: all 2 lines are damaged: .*trace.jsonl:1: timestamp: required"):
        load(str(file), skip_bad_lines=True)


def test_recorded_attention_is_told(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    np.savez(tmp_path / "attention.npz", a=np.zeros(3))
    save_file({"a": np.zeros(3, np.float32)}, tmp_path / "attention.safetensors")
    for file in tmp_path.iterdir():
        with pytest.raises(UsageError, match="recorded attention, not a log of requests") as caught:
            load(str(file))
        assert "--budget" in str(caught.value.hint)


def test_interleaving_is_for_sessions(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_bytes(TEXT)
    with pytest.raises(UsageError, match="nothing to interleave"):
        load(str(file), interleave="absolute")
    assert load(str(file)).interleaving is None
