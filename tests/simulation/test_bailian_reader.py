"""Reading Bailian's chats: seconds, kinds, turns and parents."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pikv_core.errors import PiKVError
from pikv_core.simulation.load import load
from pikv_core.simulation.trace import ROOT

CHAT = {
    "chat_id": 7,
    "parent_chat_id": -1,
    "timestamp": 61.25,
    "input_length": 40,
    "output_length": 3,
    "type": "text",
    "turn": 1,
    "hash_ids": [10, 11, 12],
}


def written(folder: Path, *records: dict[str, object]) -> str:
    path = folder / "chats.jsonl"
    path.write_text("".join(json.dumps({**CHAT, **record}) + "\n" for record in records))
    return str(path)


def test_columns(tmp_path: Path) -> None:
    file = written(
        tmp_path,
        {},
        {"chat_id": 8, "timestamp": 62, "type": "file", "hash_ids": [20]},
        {"chat_id": 9, "parent_chat_id": 7, "timestamp": 63.5, "turn": 2, "hash_ids": [10, 11, 30]},
        {"chat_id": 10, "parent_chat_id": 999, "timestamp": 64, "turn": 5},
        {"chat_id": 11, "parent_chat_id": 9, "timestamp": 65, "turn": 3},
    )
    loaded = load(file)
    trace = loaded.trace
    assert (loaded.format, trace.block_tokens, trace.is_objects) == ("bailian", 16, False)
    assert trace.timestamps_ms.tolist() == [0, 750, 2250, 2750, 3750]
    assert [trace.categories[kind] for kind in trace.category] == ["text", "file", "text", "text", "text"]
    assert trace.turn.tolist() == [0, 0, 1, 4, 2]
    assert trace.parent.tolist() == [ROOT, ROOT, 0, ROOT, 2]
    assert trace.ids[:7].tolist() == [0, 1, 2, 3, 0, 1, 4]


def test_a_log_out_of_order_is_sorted_with_everything_that_belongs_to_a_request(tmp_path: Path) -> None:
    file = written(
        tmp_path,
        {"chat_id": 1, "timestamp": 30, "hash_ids": [5, 6], "input_length": 30},
        {"chat_id": 2, "timestamp": 10, "hash_ids": [7], "input_length": 10, "type": "image"},
        {"chat_id": 3, "parent_chat_id": 1, "timestamp": 40, "hash_ids": [], "input_length": 40},
        {"chat_id": 4, "parent_chat_id": 1, "timestamp": 20, "hash_ids": [5, 8, 9], "input_length": 20},
        {"chat_id": 5, "parent_chat_id": 2, "timestamp": 30, "hash_ids": [6], "input_length": 31},
    )
    trace = load(file).trace
    assert trace.timestamps_ms.tolist() == [0, 10_000, 20_000, 20_000, 30_000]
    assert trace.input_tokens.tolist() == [10, 20, 30, 31, 40]
    assert trace.starts.tolist() == [0, 1, 4, 6, 7, 7]
    raw = {number: name for name, number in zip([5, 6, 7, 8, 9], range(5), strict=True)}
    assert [raw[number] for number in trace.ids] == [7, 5, 8, 9, 5, 6, 6]
    assert trace.parent.tolist() == [ROOT, ROOT, ROOT, 0, 2]
    assert trace.categories[trace.category[0]] == "image"


def test_what_may_be_left_out(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text('{"chat_id": 1, "timestamp": 0, "input_length": 9, "output_length": 1, "hash_ids": [1]}\n')
    trace = load(str(path)).trace
    assert (trace.categories, trace.turn.tolist(), trace.parent.tolist()) == (("all",), [0], [ROOT])


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"chat_id": "7"}, "chat_id: expected the number of a chat, got '7'"),
        ({"parent_chat_id": 2**63}, "parent_chat_id: expected the number of a chat"),
        ({"type": None}, "type: expected a name, got None"),
        ({"turn": 1.5}, "turn: expected a number from 1 on, got 1.5"),
        ({"timestamp": "now"}, "timestamp: expected seconds, got 'now'"),
    ],
)
def test_damaged_line(tmp_path: Path, change: dict[str, object], problem: str) -> None:
    file = written(tmp_path, {}, change)
    with pytest.raises(PiKVError) as caught:
        load(file)
    assert caught.value.message.startswith(f"{file}:2: {problem}")
    assert load(file, skip_bad_lines=True).trace.num_requests == 1
