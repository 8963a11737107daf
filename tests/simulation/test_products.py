"""What a study leaves beside its rows: only what was asked for, whole, and nothing of single requests on failure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyarrow import csv

from pikv_core import recipes
from pikv_core.runs import Run
from pikv_core.simulation.cost.billing import Bill
from pikv_core.simulation.policies.lru import LRU
from pikv_core.simulation.products import products
from pikv_core.simulation.replay import replay
from pikv_core.simulation.trace import make_trace

TRACE = make_trace([[0, 1], [2], [0, 1], [2], [0]], categories=["a", "b", "a", "b", "b"])
ROWS = [{"policy": "lru", "capacity_blocks": 2, "block_hit_ratio": 0.0}]
PRICED = {"serving.kv_model": "llama-3.1-8b", "serving.hardware": "h100"}


def files(folder: Path, warm_up: int = 0, **asked: Any) -> set[str]:
    """Return the names of what is left of lru's replays with room for 1 and for 3 blocks."""
    recipe = recipes.load("simulate-cache", flags={"trace": "t.jsonl", "out": str(folder), **asked})
    with products(recipe, TRACE, Bill.of(recipe.serving), warm_up, 3, Run(recipe)) as kept:
        for capacity in (1, 3):
            kept.take("lru", capacity, replay(TRACE, LRU(), capacity, backend="python"))
        kept.finish(ROWS, 0.5)
    return {path.name for path in folder.iterdir()} - {"recipe.yaml"} if folder.exists() else set()


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, set()),
        ({"diagnostics": True}, {"diagnostics.json"}),
        ({"plot": True}, {"hit-ratios.png", "reuse.png", "over-time.png"}),
        ({"plot": True, **PRICED}, {"hit-ratios.png", "reuse.png", "over-time.png", "ttft.png"}),
        (PRICED, set()),
    ],
)
def test_only_what_was_asked_for_is_there(tmp_path: Path, asked: dict[str, Any], expected: set[str]) -> None:
    assert files(tmp_path / "run", **asked) == expected


def test_diagnostics_leave_the_warm_up_out_of_kinds_and_not_of_time(tmp_path: Path) -> None:
    files(tmp_path / "run", warm_up=3, diagnostics=True)
    told = json.loads((tmp_path / "run/diagnostics.json").read_text())
    assert told["reuse"]["accesses"] == 7
    small, large = told["replays"]
    assert (small["capacity_blocks"], large["capacity_blocks"]) == (1, 3)
    assert large["by_category"] == [{"name": "b", "requests": 2, "accesses": 2, "hits": 2, "hit_ratio": 1.0}]
    assert [row["requests"] for row in large["by_turn"]] == [2]
    assert sum(large["over_time"]["hits"]) == 4


def test_the_curve_is_written_as_arrays_and_drawn(tmp_path: Path) -> None:
    recipe = recipes.load("simulate-cache", flags={"trace": "t.jsonl", "out": str(tmp_path / "run")})
    run = Run(recipe)
    arrays = {"capacity_blocks": np.arange(4), "block_hit_ratio": np.linspace(0, 1, 4)}
    with products(recipe, TRACE, None, 0, 3, run) as kept:
        kept.take_curve(arrays)
        kept.finish(ROWS, 0.5)
    with np.load(run.folder / "curve.npz") as stored:
        assert {name: stored[name].tolist() for name in stored} == {
            name: each.tolist() for name, each in arrays.items()
        }
    assert (run.folder / "hit-ratios.png").is_file()


def test_single_requests_are_there_at_the_end_alone(tmp_path: Path) -> None:
    file = tmp_path / "requests.csv"
    recipe = recipes.load("simulate-cache", flags={"trace": "t.jsonl", "per_request": str(file), **PRICED})
    found = replay(TRACE, LRU(), 3, backend="python")
    with pytest.raises(KeyboardInterrupt), products(recipe, TRACE, None, 0, 3, Run(recipe)) as kept:
        kept.take("lru", 3, found)
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    with products(recipe, TRACE, Bill.of(recipe.serving), 0, 3, Run(recipe)) as kept:
        kept.take("lru", 3, found)
        assert not file.exists()
    table = csv.read_csv(file).to_pydict()
    assert table["hit_blocks"] == found.hits.tolist()
    assert table["hit_tokens"] == [512 * hits for hits in found.hits.tolist()]
    bill = Bill.of(recipe.serving)
    assert bill is not None
    assert table["ttft_s"] == pytest.approx(bill.ttft_s(TRACE, 512 * found.hits).tolist())
