"""Where a trace's bytes come from, what is left out of damaged ones, and how columns are kept beside it."""

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
from pikv_core.simulation import kept_columns
from pikv_core.simulation import load as loading
from pikv_core.simulation.load import Loaded, load
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


@pytest.fixture
def slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a trace that is worth keeping."""
    monkeypatch.setattr(loading, "KEEP_FROM_S", 0)
    monkeypatch.setattr(loading, "KEEP_FROM_BYTES", 0)
    file = tmp_path / "trace.jsonl"
    file.write_bytes(TEXT)
    return file


def loaded_twice(file: Path) -> Loaded:
    load(str(file))
    return load(str(file))


def test_small_traces_are_not_kept(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_bytes(TEXT)
    assert not loaded_twice(file).from_kept_columns
    assert list(tmp_path.iterdir()) == [file]


def test_kept_columns(slow: Path) -> None:
    assert not load(str(slow)).from_kept_columns
    again = load(str(slow))
    assert again.from_kept_columns
    assert again.format == "mooncake"
    assert same(again.trace, expected())
    assert [again.trace.categories, again.trace.is_objects] == [("all",), False]
    assert not load(str(slow), keep_columns=False).from_kept_columns
    with pytest.raises(UsageError, match="nothing to interleave"):
        load(str(slow), interleave="absolute")


def test_without_keeping_nothing_is_written(slow: Path) -> None:
    load(str(slow), keep_columns=False)
    assert list(slow.parent.iterdir()) == [slow]


def test_kept_columns_of_objects_and_of_chats(tmp_path: Path, slow: Path) -> None:
    chats = [
        {**record, "chat_id": i, "parent_chat_id": i - 2, "type": "text" if i % 3 else "file", "turn": 1 + i // 2}
        for i, record in enumerate(RECORDS)
    ]
    slow.write_text("\n".join(json.dumps(chat) for chat in chats))
    objects = tmp_path / "objects.csv"
    objects.write_text("time,id\n" + "".join(f"{i},{i % 5}\n" for i in range(30)))
    for file in (slow, objects):
        parsed = load(str(file))
        again = load(str(file))
        assert again.from_kept_columns
        assert same(again.trace, parsed.trace)


def test_a_changed_source_is_parsed_again(slow: Path) -> None:
    load(str(slow))
    slow.write_bytes(TEXT[: TEXT.index(b"\n", 900) + 1])
    changed = load(str(slow))
    assert not changed.from_kept_columns
    assert changed.trace.num_requests < 40
    assert same(load(str(slow)).trace, changed.trace)


def test_columns_of_other_readers_are_parsed_again(slow: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(str(slow))
    monkeypatch.setattr(kept_columns, "readers_digest", lambda: "another")
    assert not load(str(slow)).from_kept_columns


def test_damaged_kept_columns_are_never_trusted_and_written_anew(slow: Path) -> None:
    load(str(slow))
    kept = kept_columns.place(slow)
    whole = kept.read_bytes()
    damaged = [whole[:cut] for cut in range(0, len(whole), 11)]
    for place in range(0, len(whole), 5):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << place % 8
        damaged.append(bytes(flipped))
    damaged.append(whole + b"more")
    num_refused = 0
    for data in damaged:
        kept.write_bytes(data)
        loaded = load(str(slow))
        assert same(loaded.trace, expected())
        if not loaded.from_kept_columns:
            num_refused += 1
            assert load(str(slow)).from_kept_columns
    assert num_refused > 0.95 * len(damaged)


def test_columns_that_do_not_belong_together_are_refused(slow: Path) -> None:
    trace = dataclasses.replace(expected(), num_blocks=2)
    kept_columns.keep(slow, "mooncake", trace)
    assert kept_columns.place(slow).is_file()
    assert kept_columns.kept(slow) is None


def test_a_folder_that_cannot_be_written_keeps_nothing(slow: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PiKVError("the folder cannot be written")

    monkeypatch.setattr(kept_columns, "replacing", refuse)
    assert not loaded_twice(slow).from_kept_columns
