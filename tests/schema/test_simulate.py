"""Settings of a replay that would be ignored, or would mean nothing, are refused before anything is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pikv_core import recipes
from pikv_core.errors import UsageError

MODEL: dict[str, Any] = {"serving.kv_model": "llama-3.1-8b"}
PRICED: dict[str, Any] = {**MODEL, "serving.hardware": "h100"}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"sample": 0.5}, "sample is of the curve"),
    ({"sample": 0.5, "curve": True, "semantics": "prefix"}, "a sample of the blocks has no prefixes"),
    ({"sample": 0.5, "curve": True, "warm_up": 0.1}, "an estimated curve counts every request"),
    ({"semantics": "object", "touch": "reverse"}, "object hits are touched forward"),
    ({"serving.kv_dtype": "float8"}, "serving.kv_dtype needs serving.kv_model"),
    ({"capacities": ["64GiB"]}, "capacities in bytes need serving.kv_model"),
    ({"serving.hardware": "h100"}, "serving.hardware needs serving.kv_model"),
    ({**PRICED, "semantics": "object"}, "times follow from prefix hits"),
    ({**PRICED, "serving.overlap": 0.5}, "serving.overlap is of loading from tiers"),
    ({**MODEL, "serving.hardware": "h101"}, "hardware: expected a known device"),
    ({**MODEL, "serving.hardware": {"peak_tflops": 0.0}}, "hardware: peak_tflops: expected a value greater than 0"),
    ({**MODEL, "serving.slo_s": 1.0}, "serving.slo_s needs serving.hardware"),
    ({**MODEL, "serving.servers": 2}, "serving.servers needs serving.hardware"),
    ({**PRICED, "serving.slo_s": float("inf")}, "serving.slo_s"),
    ({"capacities": [2**62]}, "from 1 to below 2\\^62"),
    ({"capacities": ["0B"]}, "from 1 to below 2\\^62"),
    ({"warm_up": 1.0}, "warm_up"),
    ({"interleave": "closed-loop:0"}, "interleave: expected absolute, poisson:GAP_S or closed-loop:N, got '[^']*'$"),
]


@pytest.mark.parametrize(("flags", "problem"), REFUSED)
def test_what_does_not_fit_is_refused(flags: dict[str, Any], problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        recipes.load("simulate-cache", flags={"trace": "t.jsonl", **flags})


def test_every_problem_is_told_at_once() -> None:
    flags = {"trace": "t.jsonl", "sample": 0.5, "serving.servers": 2}
    with pytest.raises(UsageError, match=r"sample is of the curve: .*; serving\.servers needs serving\.hardware"):
        recipes.load("simulate-cache", flags=flags)


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"semantics": "object", "touch": "forward", "curve": True, "sample": 0.1},
        {**PRICED, "serving.kv_dtype": "float8", "serving.servers": 3, "capacities": ["64GiB", 2**62 - 1]},
        {**PRICED, "tiers": "recipes/simulate/tiers/hbm-dram.yaml", "serving.overlap": 0.5},
    ],
)
def test_the_recipe_of_a_run_folder_loads_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: dict[str, Any]
) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    recipe = recipes.load("simulate-cache", flags={"trace": "t.jsonl", "name": "again", **flags})
    (tmp_path / "recipe.yaml").write_text(recipes.dump(recipe))
    assert recipes.load("simulate-cache", tmp_path / "recipe.yaml") == recipe


def test_a_policy_of_tokens_points_to_budgets() -> None:
    with pytest.raises(UsageError, match="policy 'h2o' is one of tokens, for recorded attention: give --budget"):
        recipes.load("simulate-cache", flags={"trace": "x", "policies": ["h2o"]})
