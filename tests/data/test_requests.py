"""The synthetic request log: seeded, in the mooncake shape, with shared prefixes and growing sessions."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from pikv_core.data import TASKS
from pikv_core.errors import UsageError
from pikv_core.runs import Reporter
from pikv_core.simulation.load import load


def write(folder: Path, num_samples: int = 600, seed: int = 0, **options: Any) -> list[dict[str, Any]]:
    task = TASKS["requests"](**options)
    assert task.write(folder, num_samples, seed, [], None, Reporter()) == {"requests.jsonl": num_samples}
    return [json.loads(line) for line in (folder / "requests.jsonl").read_text().splitlines()]


def test_the_seed_decides_every_byte(tmp_path: Path) -> None:
    texts = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        write(tmp_path / name, seed=seed)
        texts.append((tmp_path / name / "requests.jsonl").read_bytes())
    assert texts[0] == texts[1] != texts[2]


def test_a_shorter_log_is_the_beginning_of_a_longer_one(tmp_path: Path) -> None:
    assert write(tmp_path / "a", 100) == write(tmp_path / "b", 300)[:100]


@pytest.mark.parametrize("block_tokens", [16, 512])
def test_records_have_the_mooncake_shape(tmp_path: Path, block_tokens: int) -> None:
    records = write(tmp_path, block_tokens=block_tokens)
    for record in records:
        assert len(record["hash_ids"]) == -(-record["input_length"] // block_tokens)
        assert len(set(record["hash_ids"])) == len(record["hash_ids"])
        assert record["output_length"] >= 1
    assert all(earlier["timestamp"] <= later["timestamp"] for earlier, later in pairwise(records))
    seen = dict.fromkeys(block for record in records for block in record["hash_ids"])
    assert list(seen) == list(range(len(seen)))
    trace = load(str(tmp_path / "requests.jsonl")).trace
    assert (trace.num_requests, trace.block_tokens) == (len(records), block_tokens)


def test_an_id_names_its_whole_prefix(tmp_path: Path) -> None:
    parents: dict[int, int | None] = {}
    for record in write(tmp_path, block_tokens=64):
        for parent, block in pairwise([None, *record["hash_ids"]]):
            assert parents.setdefault(block, parent) == parent


def test_prefixes_are_shared_by_popularity(tmp_path: Path) -> None:
    records = write(tmp_path, 2000, num_prefixes=4, turns_mean=1.0, prefix_tokens=4096, length_sigma=0.2)
    first_blocks = Counter(record["hash_ids"][0] for record in records).most_common()
    assert len(first_blocks) == 4
    weights = [rank**-1.1 for rank in range(1, 5)]
    for (_, number), weight in zip(first_blocks, weights):
        assert number / 2000 == pytest.approx(weight / sum(weights), abs=0.05)
    by_prefix: dict[int, list[list[int]]] = {}
    for record in records:
        by_prefix.setdefault(record["hash_ids"][0], []).append(record["hash_ids"])
    for ids in by_prefix.values():
        assert len({tuple(blocks[:4]) for blocks in ids}) == 1
        assert len({blocks[-1] for blocks in ids}) == len(ids)


def test_sessions_extend_the_prompt_and_its_answer(tmp_path: Path) -> None:
    records = write(tmp_path, 800, prefix_tokens=1, length_sigma=0.1, turn_tokens=600, think_s=1.0)
    # system prompts are far below a block: whatever is shared, a session shares with itself
    latest: dict[int, dict[str, Any]] = {}
    turns: Counter[int] = Counter()
    for record in records:
        session = record["hash_ids"][0]
        if session in latest:
            before = latest[session]
            num_full = before["input_length"] // 512
            assert record["hash_ids"][:num_full] == before["hash_ids"][:num_full]
            assert record["input_length"] > before["input_length"] + before["output_length"]
            assert record["timestamp"] >= before["timestamp"]
        latest[session] = record
        turns[session] += 1
    assert len(records) / len(turns) == pytest.approx(4, rel=0.15)


def test_long_prompts_are_cut_and_end_their_session(tmp_path: Path) -> None:
    records = write(tmp_path, 300, max_input_tokens=1000, turns_mean=50.0, length_sigma=2.0)
    assert max(record["input_length"] for record in records) == 1000
    parents: dict[int, int | None] = {}
    for record in records:
        for parent, block in pairwise([None, *record["hash_ids"]]):
            assert parents.setdefault(block, parent) == parent
    assert len(write(tmp_path / "tiny", 20, max_input_tokens=1)) == 20


@pytest.mark.parametrize(("text", "column"), [(["a.txt"], None), ([], "body")])
def test_text_is_refused(tmp_path: Path, text: list[str], column: str | None) -> None:
    with pytest.raises(UsageError, match="'requests' is made without text"):
        TASKS["requests"]().write(tmp_path, 10, 0, text, column, Reporter())
    assert not list(tmp_path.iterdir())
