"""`pikv simulate-cache` as a whole: rows, curve, run folder, refusals, and nothing heavy imported."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pikv_core import recipes
from pikv_core.errors import PiKVError, UsageError
from pikv_core.jobs import simulate_cache
from pikv_core.runs import Run, plain

RECIPES = Path(__file__).parents[2] / "recipes/simulate"
REQUESTS = [[0, 1, 2], [0, 1, 3], [4], [0, 1, 2, 5], [4, 6], [0, 7]]


@pytest.fixture
def trace(tmp_path: Path) -> str:
    path = tmp_path / "trace.jsonl"
    lines = [
        {"timestamp": time, "input_length": 512 * len(ids) - 100, "output_length": 1, "hash_ids": ids}
        for time, ids in enumerate(REQUESTS)
    ]
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    return str(path)


def simulate(folder: Path, trace: str, **settings: object) -> simulate_cache.Result:
    flags = {"trace": trace, "out": str(folder / "run"), **settings}
    recipe = recipes.load("simulate-cache", flags=flags)
    return simulate_cache.run(recipe, Run(recipe))


def test_result_and_run_folder(tmp_path: Path, trace: str) -> None:
    result = simulate(tmp_path, trace, policies=["lru", "belady"], capacities=[3, 5, 3], curve=True)
    assert [(row["policy"], row["capacity_blocks"], row["touch"]) for row in result.results] == [
        ("lru", 3, "reverse"),
        ("lru", 5, "reverse"),
        ("belady", 3, "forward"),
        ("belady", 5, "forward"),
    ]
    assert (result.num_requests, result.num_unique_blocks, result.block_tokens) == (6, 8, 512)
    assert (result.semantics, result.touch, result.ceiling_hits) == ("prefix", "reverse", 7)
    lru = [row for row in result.results if row["policy"] == "lru"]
    assert result.curve == {key: [row[key] for row in lru] for key in result.curve or ()}
    assert set(result.curve or ()) == {"capacity_blocks", "block_hits", "block_hit_ratio", "token_hit_ratio"}
    folder = tmp_path / "run"
    stored = json.loads((folder / "result.json").read_text())
    assert stored["result"] == plain(result)
    assert stored["backends"] == {"replay": "numba"}
    with np.load(folder / "curve.npz") as whole:
        assert whole["capacity_blocks"].tolist() == list(range(9))
        assert whole["block_hits"][[3, 5]].tolist() == [row["block_hits"] for row in lru]
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert list((folder / "tb").iterdir())


def test_capacities_by_default_are_a_grid_up_to_all_blocks(tmp_path: Path, trace: str) -> None:
    result = simulate(tmp_path, trace, curve=True)
    assert list(dict.fromkeys(row["capacity_blocks"] for row in result.results)) == [1, 2, 4, 8]
    assert result.curve is not None
    assert result.curve["capacity_blocks"] == [1, 2, 4, 8]
    assert simulate_cache.capacity_grid(64_000) == [1000, 2000, 4000, 8000, 16_000, 32_000, 64_000]


def test_capacity_beyond_the_trace(tmp_path: Path, trace: str) -> None:
    result = simulate(tmp_path, trace, capacities=[10**15], curve=True)
    assert {row["block_hits"] for row in result.results} == {7}
    assert result.curve is not None
    assert (result.curve["capacity_blocks"], result.curve["block_hits"]) == ([10**15], [7])


def test_object_semantics_touch_forward(tmp_path: Path, trace: str) -> None:
    result = simulate(tmp_path, trace, semantics="object", touch="reverse", capacities=[8])
    assert result.touch == "forward"
    assert {row["touch"] for row in result.results} == {"forward"}
    assert {row["block_hits"] for row in result.results} == {15 - 8}


def test_a_trace_that_cannot_be_read_leaves_no_run_folder(tmp_path: Path) -> None:
    with pytest.raises(PiKVError, match="no such file"):
        simulate(tmp_path, str(tmp_path / "none.jsonl"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("capacity", [0, -5])
def test_capacities_start_at_one(tmp_path: Path, trace: str, capacity: int) -> None:
    with pytest.raises(UsageError, match="capacities"):
        simulate(tmp_path, trace, capacities=[capacity])


def test_the_same_command_gives_the_same_result(tmp_path: Path, trace: str) -> None:
    first, second = (simulate(tmp_path / name, trace, curve=True) for name in "ab")
    assert dataclasses.asdict(first) == dataclasses.asdict(second)


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*.yaml")), ids=lambda file: file.stem)
def test_shipped_recipe_runs(tmp_path: Path, trace: str, file: Path) -> None:
    recipe = recipes.load("simulate-cache", file, flags={"trace": trace, "out": str(tmp_path / "run")})
    assert simulate_cache.run(recipe, Run(recipe)).results


def test_the_command_prints_json_alone_and_never_imports_torch(tmp_path: Path, trace: str) -> None:
    program = (
        "import sys\n"
        "from pikv_cli.app import main\n"
        "try:\n    main()\n"
        "finally:\n    print([name for name in ('torch', 'triton') if name in sys.modules], file=sys.stderr)\n"
    )
    command = ["simulate-cache", "-", "--policy", "lru,fifo", "--capacity", "2,4", "--curve", "--json"]
    done = subprocess.run(
        [sys.executable, "-c", program, *command],
        input=Path(trace).read_text(),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=True,
    )
    assert len(json.loads(done.stdout)["results"]) == 4
    assert done.stderr.splitlines()[-1] == "[]"
    assert (tmp_path / "runs/simulate-cache-1/curve.png").is_file()
