"""Reading records that name their block size, and the tokens of each block where known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pikv_core.errors import PiKVError
from pikv_core.simulation.load import load

RECORD = {"timestamp": 5, "input_length": 40, "output_length": 3, "hash_ids": [1, 2, 3], "block_size": 16}


def written(folder: Path, *changes: dict[str, object]) -> str:
    path = folder / "blocks.jsonl"
    path.write_text("\n".join(json.dumps({**RECORD, **change}) for change in changes))
    return str(path)


def test_columns(tmp_path: Path) -> None:
    loaded = load(
        written(
            tmp_path,
            {},
            {"block_tokens": [16, 16, 8], "timestamp": 7},
            {"block_tokens": [16], "hash_ids": [1], "timestamp": 9},
            {"block_tokens": None, "hash_ids": [], "timestamp": 9.5},
        )
    )
    assert (loaded.format, loaded.trace.block_tokens) == ("blocks", 16)
    assert loaded.trace.ids.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert loaded.trace.timestamps_ms.tolist() == [0, 2, 4, 4.5]
    assert loaded.trace.input_tokens.tolist() == [40, 40, 40, 40]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"block_size": 32}, "block_size: expected 16 as in the lines before, got 32"),
        ({"block_size": 0}, "block_size: expected a number of tokens of at least 1, got 0"),
        ({"block_size": True}, "block_size: expected a number of tokens of at least 1, got True"),
        ({"block_tokens": [16, 24]}, "block_tokens: expected a list of 3 numbers, one per block, got [16, 24]"),
        ({"block_tokens": 40}, "block_tokens: expected a list of 3 numbers, one per block, got 40"),
        ({"block_tokens": [16, 16, 17]}, "block_tokens: expected numbers of tokens from 1 to 16, got [16, 16, 17]"),
        ({"block_tokens": [16, 8, 16]}, "block_tokens: expected 16 in every block but the last, got [16, 8, 16]"),
        ({"block_tokens": [16, 16, 9]}, "block_tokens: expected at most the 40 of input_length, got 41"),
    ],
)
def test_damaged_line(tmp_path: Path, change: dict[str, object], problem: str) -> None:
    file = written(tmp_path, {}, change)
    with pytest.raises(PiKVError) as caught:
        load(file)
    assert caught.value.message == f"{file}:2: {problem}"


def test_every_record_names_its_block_size(tmp_path: Path) -> None:
    file = tmp_path / "blocks.jsonl"
    lines = [dict(RECORD), {key: value for key, value in RECORD.items() if key != "block_size"}]
    file.write_text("\n".join(json.dumps(line) for line in lines))
    with pytest.raises(PiKVError, match=r"blocks.jsonl:2: block_size: required, but not given"):
        load(str(file))
