"""What a log cannot tell, and files that would take the place of others, are refused before any replay."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pikv_core import recipes
from pikv_core.errors import PiKVError, UsageError
from pikv_core.runs import Run
from pikv_core.simulation.opened import Conventions, open_trace
from pikv_core.simulation.trace import Trace


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    ids = [[0, 1], [0, 1, 2], [3]]
    lines = [
        {"timestamp": number, "input_length": 512 * len(blocks) - 1, "output_length": 1, "hash_ids": blocks}
        for number, blocks in enumerate(ids)
    ]
    (tmp_path / "requests.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "short.jsonl").write_text(json.dumps({**lines[2], "input_length": 511}) + "\n")
    (tmp_path / "objects.csv").write_text("time,id\n0,1\n1,2\n2,1\n")
    (tmp_path / "lengths.csv").write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03,4096,10\n2023-11-16 18:17:04,96,10\n"
    )
    return tmp_path


def opened(trace: Path, **settings: Any) -> tuple[Trace, Conventions]:
    recipe = recipes.load("simulate-cache", flags={"trace": str(trace), "out": str(trace.parent / "run"), **settings})
    return open_trace(recipe, Run(recipe))


def test_full_blocks_change_what_is_counted(folder: Path) -> None:
    trace, told = opened(folder / "requests.jsonl", partial_blocks=False)
    assert trace.blocks_per_request.tolist() == [1, 2, 0]
    assert (told.num_accesses, told.num_unique_blocks, told.partial_block_counts) == (3, 2, False)
    with pytest.raises(PiKVError, match="no prompt fills a block of 512 tokens"):
        opened(folder / "short.jsonl", partial_blocks=False)


@pytest.mark.parametrize(
    ("share", "num_requests", "warm_up"), [(0.29, 100, 29), (0.57, 100, 57), (0.99, 3, 2), (0.0, 3, 0), (0.3, 10, 3)]
)
def test_a_warm_up_is_the_share_as_written(folder: Path, share: float, num_requests: int, warm_up: int) -> None:
    (folder / "many.jsonl").write_text((folder / "short.jsonl").read_text() * num_requests)
    assert opened(folder / "many.jsonl", warm_up=share)[1].warm_up_requests == warm_up


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"semantics": "prefix"}, "has no prefixes to hit"),
        ({"touch": "reverse"}, "is touched forward"),
        ({"serving.kv_model": "llama-3.1-8b"}, "neither their bytes nor their times"),
    ],
)
def test_a_log_of_single_objects_has_no_prompts(folder: Path, settings: dict[str, Any], problem: str) -> None:
    assert opened(folder / "objects.csv")[1].semantics == "object"
    with pytest.raises(UsageError, match=problem):
        opened(folder / "objects.csv", **settings)


def test_a_sample_tells_of_object_hits_alone(folder: Path) -> None:
    sampled = {"curve": True, "sample": 0.5}
    assert opened(folder / "objects.csv", **sampled)[1].touch == "forward"
    with pytest.raises(UsageError, match="it tells nothing of prefix hits"):
        opened(folder / "requests.jsonl", **sampled)


@pytest.mark.parametrize(
    "settings", [{"curve": True}, {"diagnostics": True}, {"plot": True}, {"per_request": "requests.csv"}]
)
def test_a_log_of_lengths_has_nothing_to_replay(folder: Path, settings: dict[str, Any]) -> None:
    assert opened(folder / "lengths.csv")[1].num_accesses == 0
    with pytest.raises(UsageError, match=f"names no blocks, so there is no {next(iter(settings))}"):
        opened(folder / "lengths.csv", **settings)


def test_files_take_no_place_that_is_taken(folder: Path) -> None:
    kept = folder / "kept.csv"
    kept.mkdir()
    (kept / "mine").touch()
    trace = folder / "requests.jsonl"
    before = trace.read_bytes()
    for key in ("export", "per_request"):
        with pytest.raises(UsageError, match=f"{key}: .*kept.csv' is a folder"):
            opened(trace, **{key: str(kept)})
    with pytest.raises(UsageError, match=r"export: .* is the file of trace too"):
        opened(trace, export=str(folder / "kept.csv/../requests.jsonl"))
    with pytest.raises(UsageError, match=r"export: .* is the file of per_request too"):
        opened(trace, export=str(folder / "new.csv"), per_request=str(folder / "new.csv"))
    assert (kept / "mine").exists() and trace.read_bytes() == before
