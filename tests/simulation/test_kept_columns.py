"""Columns kept beside a trace: read for the same bytes and the same readers alone, damaged ones never."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from pikv_core.errors import PiKVError, UsageError
from pikv_core.simulation import kept_columns
from pikv_core.simulation import load as loading
from pikv_core.simulation.load import Loaded, load
from pikv_core.simulation.trace import Trace, make_trace

RECORDS = [
    {"timestamp": 10 * i, "input_length": 512 * (i % 7), "output_length": i, "hash_ids": list(range(i % 7))}
    for i in range(40)
]
TEXT = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()


def same(one: Trace, other: Trace) -> bool:
    return all(
        np.array_equal(getattr(one, field.name), getattr(other, field.name)) for field in dataclasses.fields(Trace)
    )


def expected() -> Trace:
    trace = make_trace([list(range(i % 7)) for i in range(40)], timestamps_ms=[10.0 * i for i in range(40)])
    return dataclasses.replace(trace, output_tokens=np.arange(40))


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
