"""`pikv simulate-cache` as a whole: rows, curve, run folder, refusals, and nothing heavy imported."""

from __future__ import annotations

import dataclasses
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyarrow import csv, parquet

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


def simulate(folder: Path, trace: str, **settings: object) -> Any:
    flags = {"trace": trace, "out": str(folder / "run"), **settings}
    recipe = recipes.load("simulate-cache", flags=flags)
    return importlib.import_module(f"pikv_core.jobs.{recipe.job}").run(recipe, Run(recipe))


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
    assert result.curve is not None
    for key in ("capacity_blocks", "block_hits", "block_hit_ratio", "token_hit_ratio"):
        assert getattr(result.curve, key) == [row[key] for row in lru]
    folder = tmp_path / "run"
    stored = json.loads((folder / "result.json").read_text())
    assert stored["result"] == plain(result)
    assert stored["backends"] == {"replay": "numba"}
    with np.load(folder / "curve.npz") as whole:
        assert whole["capacity_blocks"].tolist() == list(range(9))
        assert whole["block_hits"][[3, 5]].tolist() == [row["block_hits"] for row in lru]
    assert (folder / "hit-ratios.png").read_bytes().startswith(b"\x89PNG")
    assert list((folder / "tb").iterdir())


def test_capacities_by_default_are_a_grid_up_to_all_blocks(tmp_path: Path, trace: str) -> None:
    result = simulate(tmp_path, trace, curve=True)
    assert list(dict.fromkeys(row["capacity_blocks"] for row in result.results)) == [1, 2, 4, 8]
    assert result.curve is not None
    assert result.curve.capacity_blocks == [1, 2, 4, 8]
    assert simulate_cache.capacity_grid(64_000) == [1000, 2000, 4000, 8000, 16_000, 32_000, 64_000]


def test_capacity_beyond_the_trace(tmp_path: Path, trace: str) -> None:
    result = simulate(tmp_path, trace, capacities=[10**15], curve=True)
    assert {row["block_hits"] for row in result.results} == {7}
    assert result.curve is not None
    assert (result.curve.capacity_blocks, result.curve.block_hits) == ([10**15], [7])


def test_object_semantics_touch_forward(tmp_path: Path, trace: str) -> None:
    result = simulate(tmp_path, trace, semantics="object", capacities=[8])
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


@pytest.mark.parametrize("name", ["demo", "sweep", "tiers"])
def test_shipped_recipe_runs(tmp_path: Path, trace: str, name: str) -> None:
    flags = {"trace": trace, "out": str(tmp_path / "run")}
    recipe = recipes.load("simulate-cache", RECIPES / f"{name}.yaml", flags=flags)
    assert importlib.import_module(f"pikv_core.jobs.{recipe.job}").run(recipe, Run(recipe)).results
    pictures = {
        "demo": {"hit-ratios"},
        "sweep": {"hit-ratios", "reuse", "over-time", "ttft"},
        "tiers": {"ttft", "tiers"},
    }
    assert {file.stem for file in (tmp_path / "run").glob("*.png")} == pictures[name]


def test_the_seed_of_the_recipe_draws_random_victims(tmp_path: Path, trace: str) -> None:
    hits = {
        seed: [
            row["evictions"] for row in simulate(tmp_path / str(seed), trace, policies=["random"], seed=seed).results
        ]
        for seed in range(6)
    }
    assert len({tuple(row) for row in hits.values()}) > 1


def test_no_hits_have_no_worthwhile_capacity(tmp_path: Path, trace: str) -> None:
    once = tmp_path / "once.jsonl"
    once.write_text(Path(trace).read_text().splitlines()[0])
    result = simulate(tmp_path / "once", str(once), policies=["lru"], capacities=[8], curve=True)
    assert (result.ceiling_hits, result.curve.worthwhile_capacity_blocks) == (0, None)


SERVING = {"serving.kv_model": "llama-3.1-8b", "serving.hardware": "h100"}


def test_rows_are_compared_with_the_ceiling_and_the_optimum(tmp_path: Path, trace: str) -> None:
    result = simulate(tmp_path, trace, policies=["lru", "belady"], capacities=[3])
    lru, belady = result.results
    assert lru["share_of_ceiling"] == lru["block_hits"] / 7
    assert lru["gap_to_optimum"] == belady["block_hit_ratio"] - lru["block_hit_ratio"]
    assert belady["gap_to_optimum"] == 0
    alone = simulate(tmp_path / "alone", trace, policies=["lru"], capacities=[3])
    assert alone.results[0]["gap_to_optimum"] is None


def test_a_warm_up_is_replayed_and_not_counted(tmp_path: Path, trace: str) -> None:
    flags = {"policies": ["infinite"], "capacities": [8], "curve": True}
    result = simulate(tmp_path, trace, **flags, warm_up=0.5, diagnostics=True)
    hits = [0, 2, 0, 3, 1, 1]  # of REQUESTS, in an infinite cache
    assert result.warm_up_requests == 3
    assert result.ceiling_hits == sum(hits[3:]) == result.results[0]["block_hits"] == result.curve.block_hits[0]
    assert result.results[0]["block_accesses"] == sum(map(len, REQUESTS[3:]))
    assert result.curve.block_hit_ratio == [result.results[0]["block_hit_ratio"]]
    (found,) = json.loads((tmp_path / "run/diagnostics.json").read_text())["replays"]
    assert [row["hits"] for row in found["by_category"]] == [sum(hits[3:])]
    assert sum(found["over_time"]["hits"]) == sum(hits)  # from the beginning, to show how the cache fills


def test_capacities_in_bytes_follow_from_the_model(tmp_path: Path, trace: str) -> None:
    result = simulate(tmp_path, trace, policies=["lru"], capacities=["192MiB"], **SERVING)
    (row,) = result.results
    assert row["capacity_blocks"] == 3  # of 512 tokens of 128 KiB
    assert row["capacity_bytes"] == 192 * 2**20
    assert row["gpu_s"] < row["gpu_s_without_cache"]
    with pytest.raises(UsageError, match=r"capacities in bytes need serving\.kv_model"):
        simulate(tmp_path / "without", trace, capacities=["192MiB"])


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_single_requests_add_up_to_the_rows(tmp_path: Path, trace: str, suffix: str) -> None:
    file = tmp_path / f"requests.{suffix}"
    result = simulate(
        tmp_path, trace, policies=["lru", "fifo"], capacities=[2, 4], per_request=str(file), threads=2, **SERVING
    )
    table = (parquet.read_table(file) if suffix == "parquet" else csv.read_csv(file)).to_pylist()
    assert len(table) == 4 * len(REQUESTS)
    for row in result.results:
        of = [
            each
            for each in table
            if (each["policy"], each["capacity_blocks"]) == (row["policy"], row["capacity_blocks"])
        ]
        assert [each["request"] for each in of] == list(range(len(REQUESTS)))
        assert sum(each["hit_blocks"] for each in of) == row["block_hits"]
        assert max(each["ttft_s"] for each in of) >= row["ttft_p95_s"]


def test_files_may_lie_in_the_run_folder(tmp_path: Path, trace: str) -> None:
    run = tmp_path / "run"
    simulate(
        tmp_path, trace, capacities=[3], export=str(run / "trace.oracleGeneral"), per_request=str(run / "below/r.csv")
    )
    assert {"trace.oracleGeneral", "below", "recipe.yaml", "result.json"} <= {file.name for file in run.iterdir()}


def test_a_per_request_file_of_no_format_is_refused_before_the_trace_is_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"expected a file ending in .parquet or .csv, got 'x.txt'"):
        simulate(tmp_path, str(tmp_path / "none.jsonl"), per_request="x.txt")


def test_an_exported_trace_has_the_same_object_hits(tmp_path: Path, trace: str) -> None:
    file = str(tmp_path / "trace.oracleGeneral")
    first = simulate(tmp_path / "first", trace, semantics="object", capacities=[3], export=file)
    again = simulate(tmp_path / "again", file, capacities=[3])
    assert again.semantics == "object" and again.format == "oracleGeneral"
    assert [row["block_hits"] for row in again.results] == [row["block_hits"] for row in first.results]
    with pytest.raises(UsageError, match="has no prefixes"):
        simulate(tmp_path / "prefix", file, semantics="prefix")


def test_full_blocks_alone(tmp_path: Path, trace: str) -> None:
    result = simulate(tmp_path, trace, policies=["infinite"], capacities=[8], partial_blocks=False)
    assert not result.partial_block_counts
    assert result.num_accesses == sum(len(request) - 1 for request in REQUESTS)  # every last block is partly filled
    assert result.results[0]["block_hits"] == 0 + 2 + 0 + 2 + 0 + 1


def test_a_log_of_lengths_tells_times_and_no_hits(tmp_path: Path) -> None:
    file = tmp_path / "lengths.csv"
    lines = [f"2023-11-16 18:17:{second:02}.0000000,4096,10" for second in range(3)]
    file.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *lines]) + "\n")
    with pytest.raises(PiKVError, match="names no blocks, so it has no hits"):
        simulate(tmp_path, str(file))
    (row,) = simulate(tmp_path / "times", str(file), **SERVING).results
    assert row["gpu_s"] == row["gpu_s_without_cache"] > 0


def test_an_estimated_curve_says_how_sure_it_is(tmp_path: Path, trace: str) -> None:
    result = simulate(tmp_path, trace, semantics="object", curve=True, sample=0.5, capacities=[4])
    assert result.curve.sampled_blocks <= 8 and "sample a larger share" in result.curve.warning
    assert len(result.curve.block_hit_ratio_error) == 1
    with pytest.raises(UsageError, match="a sample of the blocks has no prefixes"):
        simulate(tmp_path / "prefix", trace, curve=True, sample=0.5)


def test_tiers_have_policies_of_their_own(tmp_path: Path, trace: str) -> None:
    tiers = tmp_path / "tiers.yaml"
    tiers.write_text("tiers:\n- {name: hbm, capacity: 2}\n- {name: remote, capacity: unlimited}\n")
    result = simulate(tmp_path, trace, tiers=str(tiers), per_request=str(tmp_path / "r.csv"), **SERVING)
    assert [row["tier"] for row in result.results] == ["hbm", "remote"]
    assert sum(row["block_hits"] for row in result.results) == result.block_hits <= result.ceiling_hits
    assert len(csv.read_csv(tmp_path / "r.csv")) == len(REQUESTS)
    with pytest.raises(UsageError, match="tiers have policies and capacities of their own"):
        simulate(tmp_path / "both", trace, tiers=str(tiers), policies=["lru"], **SERVING)
    with pytest.raises(UsageError, match=r"tiers need serving.kv_model and serving.hardware"):
        simulate(tmp_path / "neither", trace, tiers=str(tiers))


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
    assert (tmp_path / "runs/simulate-cache-1/hit-ratios.png").is_file()
