"""Files of tiers: what is read from them, every mistake at once, and the shipped ones."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from pikv_core.components import Component
from pikv_core.errors import PiKVError, RecipeError, UsageError
from pikv_core.simulation.cost.kv_model import KvModel
from pikv_core.simulation.cost.priced import build_priced
from pikv_core.simulation.cost.tiers import KNOWN, load_tiers, make_tiers

MODEL = KvModel.load("llama-3.1-8b")
SHIPPED = sorted((Path(__file__).parents[3] / "recipes/simulate/tiers").glob("*.yaml"))


def test_a_file_of_tiers(tmp_path: Path) -> None:
    file = tmp_path / "tiers.yaml"
    file.write_text(
        "tiers:\n"
        "  - {name: hbm, capacity: 1GiB, write: through}\n"
        "  - {name: dram, capacity: 100, policy: fifo, read_gb_per_s: 20, promote: false}\n"
        "  - {name: tape, capacity: unlimited, gb_per_s: 2e-1, latency_ms: 5000}\n"
    )
    hbm, dram, tape = load_tiers(file, MODEL, 512)
    assert (hbm.capacity_blocks, hbm.policy.name, hbm.writes_through, hbm.promotes) == (16, "lru", True, True)
    assert (hbm.read_bytes_per_s, hbm.latency_s) == (math.inf, 0)
    assert (dram.capacity_blocks, dram.policy.name, dram.promotes, dram.writes_through) == (100, "fifo", False, False)
    assert (dram.read_bytes_per_s, dram.write_bytes_per_s) == (20e9, KNOWN["dram"].write_gb_per_s * 1e9)
    assert (tape.capacity_blocks, tape.read_bytes_per_s, tape.latency_s) == (None, 0.2e9, 5)


@pytest.mark.parametrize(
    ("tiers", "words"),
    [
        ([], ("tiers: expected at least one entry",)),
        ([{"name": "hbm"}], ("tiers.0.capacity: required",)),
        ([{"name": "hbm", "capacity": "some"}], ("tiers.0.capacity: expected a whole number of blocks",)),
        ([{"name": "hbm", "capacity": 0}], ("tiers.0.capacity: expected a whole number of blocks",)),
        ([{"name": "hbm", "capacity": 5, "polcy": "lru"}], ("tiers.0.polcy: unknown key; did you mean 'policy'?",)),
        ([{"name": "hbm", "capacity": 5, "policy": "lrv"}], ("unknown policy 'lrv'; did you mean 'lru'?",)),
        ([{"name": "hbm", "capacity": 5, "write": "around"}], ("tiers.0.write: expected 'back' or 'through'",)),
        ([{"name": "hbm", "capacity": 5, "gb_per_s": -1}], ("tiers.0.gb_per_s: expected GB/s above 0, or unlimited",)),
        ([{"name": "hbm", "capacity": 5, "latency_ms": -1}], ("tiers.0.latency_ms",)),
        ([{"name": "tape", "capacity": 5}], ("tier 'tape' needs gb_per_s and latency_ms",)),
        ([{"name": "tape", "capacity": 5, "read_gb_per_s": 3, "latency_ms": 0}], ("tier 'tape' needs gb_per_s;",)),
        (
            [{"name": "hbm", "capacity": "unlimited"}, {"name": "hbm", "capacity": 3, "policy": "belady"}],
            ("the name 'hbm' is given to more than one", "only the last tier can be unlimited", "policy 'belady'"),
        ),
    ],
)
def test_every_mistake_is_told_with_its_place(tiers: list[dict[str, Any]], words: tuple[str, ...]) -> None:
    with pytest.raises(RecipeError) as caught:
        make_tiers({"tiers": tiers}, MODEL, 512, "my.yaml")
    assert all(word in caught.value.message for word in ("my.yaml", *words)), caught.value.message
    assert caught.value.hint and "recipes/simulate/tiers/" in caught.value.hint


def test_files_that_hold_no_tiers(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read the tiers: no such file"):
        load_tiers(tmp_path / "none.yaml", MODEL, 512)
    with pytest.raises(UsageError, match="expected the key tiers"):
        make_tiers([], MODEL, 512)
    with pytest.raises(PiKVError, match="holds no block"):
        make_tiers({"tiers": [{"name": "hbm", "capacity": "1MiB"}]}, MODEL, 512)


def test_a_policy_that_goes_by_costs_takes_them_from_the_model() -> None:
    given = {"name": "gdsf", "attention_tokens": 9.0}
    tiers = make_tiers(
        {
            "tiers": [
                {"name": "hbm", "capacity": 5, "policy": "gdsf"},
                {"name": "dram", "capacity": 5, "policy": given},
            ]
        },
        MODEL,
        512,
    )
    assert [vars(tier.policy) for tier in tiers] == [
        {"attention_tokens": MODEL.attention_tokens},
        {"attention_tokens": 9.0},
    ]
    assert vars(build_priced(Component("gdsf"), None)) == {"attention_tokens": None}
    assert vars(build_priced(Component("random"), MODEL, seed=-7)) == {"seed": 7}
    assert vars(build_priced(Component("random", {"seed": 3}), None, seed=7)) == {"seed": 3}
    assert build_priced(Component("lru"), MODEL).name == "lru"


def test_belady_may_run_on_top() -> None:
    top, _ = make_tiers(
        {"tiers": [{"name": "hbm", "capacity": 5, "policy": "belady"}, {"name": "ssd", "capacity": "unlimited"}]},
        MODEL,
        512,
    )
    assert top.policy.knows_future


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.name)
def test_shipped_files_are_valid_and_say_how_to_run(file: Path) -> None:
    assert load_tiers(file, MODEL, 512)
    opening = "\n".join(line for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("#"))
    assert "pikv simulate-cache " in opening and f"--tiers recipes/simulate/tiers/{file.name}" in opening


def test_there_are_shipped_files() -> None:
    assert len(SHIPPED) >= 3
