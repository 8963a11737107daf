"""The machinery of the comparisons with other simulators: questions and answers, the drawn trace, the pages."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.peers import kvcache_simulator_table, libcachesim_table
from benchmarks.peers.peer import Peer
from benchmarks.peers.zipf import zipf_trace

PROGRAM = """
import json, sys
for line in sys.stdin:
    question = json.loads(line)
    if question.get("end"):
        sys.exit(3)
    print(json.dumps({"doubled": 2 * question["number"]}), flush=True)
"""


def test_peer_answers_until_it_ends(tmp_path: Path) -> None:
    program = tmp_path / "child.py"
    program.write_text(PROGRAM)
    with Peer(Path(sys.executable), program) as peer:
        assert [peer.ask(number=number)["doubled"] for number in (1, 20)] == [2, 40]
        with pytest.raises(RuntimeError, match="the peer ended at"):
            peer.ask(end=True)
    assert peer.process.returncode == 3


def test_zipf_trace_is_drawn_by_weight_and_seed() -> None:
    trace, again, other = (zipf_trace(20_000, 50, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(trace.ids, again.ids)
    assert (trace.ids != other.ids).any()
    assert trace.is_objects and trace.num_requests == trace.ids.size == 20_000 and trace.num_blocks == 50
    expected = 1 / np.arange(1, 51)
    found = np.sort(np.bincount(trace.ids))[::-1] / trace.ids.size
    np.testing.assert_allclose(found, expected / expected.sum(), atol=0.01)


def origin(peer: str) -> dict[str, Any]:
    return {
        "machine": "a machine",
        "commit": "0123456789abcdef0123456789abcdef01234567 with changes",
        "load_average": [0.25, 0, 0],
        "rounds": 3,
        "pikv": {"pikv": "0.1.0", "python": "3.11", "numba": "0.61"},
        peer: {"python": "3.11", peer: "9.9"},
    }


def test_libcachesim_page_tells_equal_hits_and_ratios() -> None:
    def row(policy: str, theirs: int, ours: int) -> dict[str, Any]:
        rates = {"libcachesim": 5e6, "libcachesim_tuned": 10e6, "pikv": 60e6}
        hits = {"libcachesim": theirs, "pikv": ours}
        return {"policy": policy, "capacity_blocks": 1000, "hits": hits, "accesses_per_s": rates}

    seconds = {"libcachesim": 12.0, "libcachesim_tuned": 6.0, "pikv": 2.0}
    page = libcachesim_table.table(
        origin("libcachesim")
        | {
            "traces": {"zipf": {"num_accesses": 10, "num_blocks": 4, "rows": [row("lru", 7, 7), row("arc", 7, 6)]}},
            "sweep": [{"policies": ["lru", "arc"], "capacity_blocks": 1000, "median_s": seconds}],
        }
    )
    assert "| lru | 1,000 | 7 | equal | 5.0 | 10.0 | 60.0 | 12.0 | 6.0 |" in page
    assert "| arc | 1,000 | 7 | 6 |" in page
    assert "| 1,000 | 12.00 | 6.00 | 2.00 | 6.0 | 3.0 |" in page
    assert "commit 0123456789ab with changes" in page


def test_kvcache_simulator_page_counts_equal_capacities() -> None:
    hits = [
        {"policy": policy, "capacity_blocks": capacity, "kvcache-simulator": theirs, "pikv": 5}
        for capacity, theirs in ((10, 4), (30, 5), (40, 5))
        for policy in ("lru", "fifo", "optimal")
    ]
    both = {"kvcache-simulator": {"median_cpu_s": 0.5, "median_s": 0.7}, "pikv": {"median_cpu_s": 1.0}}
    page = kvcache_simulator_table.table(
        origin("kvcache-simulator")
        | {"num_requests": 2, "num_accesses": 9, "num_blocks": 8, "longest_request_blocks": 20, "hits": hits}
        | {"replay": {"read": both, "replay": both, "curve": both}, "command_line": {"cold": both, "warm": both}}
    )
    assert "| lru | 3 | 2 of 2 | 0 of 1 |" in page
    assert "| 10 | 4 | 5 | 4 | 5 | 4 | 5 |" in page
    assert "| command line, warm | 0.500 (0.70) | 1.000 | 0.5 |" in page
