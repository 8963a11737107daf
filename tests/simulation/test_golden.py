"""Every pinned integer of the generated trace holds, and is what other simulators count where they define it alike.

benchmarks/peers/golden.py pins them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from pikv_core.components import build
from pikv_core.files import sha256
from pikv_core.schema.base import RequestPolicySpec
from pikv_core.simulation.load import load
from pikv_core.simulation.metrics import hit_tokens
from pikv_core.simulation.policies import REQUEST_POLICIES
from pikv_core.simulation.replay import replay
from pikv_core.simulation.trace import Trace

FOLDER = Path(__file__).parents[2] / "data" / "simulation"
GOLDEN: dict[str, Any] = json.loads((FOLDER / "golden.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def trace() -> Trace:
    return load(str(FOLDER / "requests.jsonl"), keep_columns=False).trace


def test_trace(trace: Trace) -> None:
    assert sha256(FOLDER / "requests.jsonl") == GOLDEN["trace"]["sha256"]
    found = {"num_requests": trace.num_requests, "num_blocks": trace.num_blocks}
    assert found == {key: GOLDEN["trace"][key] for key in found}


@pytest.mark.parametrize("spec", GOLDEN["hits"])
def test_pinned_hits(trace: Trace, spec: str) -> None:
    policy = build(REQUEST_POLICIES, TypeAdapter(RequestPolicySpec).validate_python(spec))
    found = {
        capacity: {semantics: replay(trace, policy, int(capacity), semantics).block_hits for semantics in hits}
        for capacity, hits in GOLDEN["hits"][spec].items()
    }
    assert found == GOLDEN["hits"][spec]


@pytest.mark.parametrize("policy", GOLDEN["libcachesim"]["object_hits"])
def test_pinned_hits_are_those_of_libcachesim(policy: str) -> None:
    pinned = {capacity: hits["object"] for capacity, hits in GOLDEN["hits"][policy].items()}
    assert pinned == GOLDEN["libcachesim"]["object_hits"][policy]


@pytest.mark.parametrize(("policy", "touch"), [("lru", "reverse"), ("fifo", "forward")])
def test_hit_tokens_are_those_of_kvcache_simulator(trace: Trace, policy: str, touch: Any) -> None:
    warm_up = GOLDEN["kvcache-simulator"]["warm_up_requests"]
    counted = GOLDEN["kvcache-simulator"]["hit_tokens"][policy]
    for capacity, tokens in counted.items():
        hits = replay(trace, REQUEST_POLICIES[policy](), int(capacity), touch=touch).hits
        assert int(hit_tokens(trace, hits)[warm_up:].sum()) == tokens
