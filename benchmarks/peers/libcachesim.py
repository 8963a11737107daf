"""PiKV beside libCacheSim 0.3.5: object hits and requests per second on the same traces in the same run.

    python benchmarks/peers/libcachesim.py --conversation ../shared/traces/mooncake_conversation_trace.jsonl

libCacheSim runs in .venv-libcachesim or where --env says, by the fastest path that its Python binding has:
`process_trace` over a memory-mapped oracleGeneral file (its own lcs format is read slower). It runs with its default
hash table and with the best of some smaller ones, which alone makes it up to three times as fast on a long trace.
Sides alternate; numbers are medians of CPU time on one thread.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from libcachesim_table import table
from peer import ROOT, Peer, peer_python
from report import commit, machine
from zipf import zipf_trace

from pikv_core.files import write_json, write_text
from pikv_core.runs import versions
from pikv_core.simulation.export import export_oracle_general
from pikv_core.simulation.load import load
from pikv_core.simulation.policies import REQUEST_POLICIES
from pikv_core.simulation.replay import replay
from pikv_core.simulation.trace import Trace

PACKAGES = ("libcachesim==0.3.5",)
CHILD = Path(__file__).parent / "libcachesim_side" / "child.py"
NAMES = {
    "lru": "LRU",
    "fifo": "FIFO",
    "sieve": "Sieve",
    "belady": "Belady",
    "lfu": "LFU",
    "s3fifo": "S3FIFO",
    "clock": "Clock",
    "slru": "SLRU",
    "arc": "ARC",
    "lru-k": "LRUK",
    "wtinylfu": "WTinyLFU",
    "gdsf": "GDSF",
}
SAME = ("lru", "fifo", "lfu", "sieve", "belady")  # defined alike on both sides: their hits have to be equal
SWEEP = ("lru", "fifo", "lfu", "sieve", "s3fifo", "belady")
TABLE_POWERS = (14, 16, 18, 20)  # beside libCacheSim's default of 24: the hash table has 2**power buckets


def main() -> int:
    """Measure both sides, write libcachesim.json and libcachesim.md; return 1 where hits differ that must not."""
    arguments = _arguments()
    python = arguments.env or peer_python("libcachesim", PACKAGES)
    load_before = os.getloadavg()
    with tempfile.TemporaryDirectory() as folder, Peer(python, CHILD) as peer:
        found: dict[str, Any] = {"machine": machine(), "commit": commit(), "load_average": load_before}
        found |= {"pikv": versions(), "libcachesim": peer.ask()}
        found["rounds"] = arguments.rounds
        found["traces"] = {}
        for name, trace, capacities in _traces(arguments):
            file = Path(folder) / f"{name}.oracleGeneral"
            export_oracle_general(trace, file)
            rows = _rows(peer, file, trace, arguments.policies, capacities, arguments.rounds)
            sizes = {"num_accesses": int(trace.ids.size), "num_blocks": trace.num_blocks}
            found["traces"][name] = {**sizes, "rows": rows}
            if name == "zipf":
                found["sweep"] = _sweep(peer, file, rows, arguments.rounds)
    write_json(arguments.out / "libcachesim.json", found)
    write_text(arguments.out / "libcachesim.md", table(found))
    print(table(found))
    rows = [row for trace in found["traces"].values() for row in trace["rows"] if row["policy"] in SAME]
    return int(any(row["hits"]["pikv"] != row["hits"]["libcachesim"] for row in rows))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversation", type=Path, help="Mooncake's conversation trace; left out: not compared")
    parser.add_argument("--env", type=Path, help="the Python of an environment with libcachesim 0.3.5")
    parser.add_argument("--accesses", type=int, default=10_000_000, help="of the zipf trace")
    parser.add_argument("--policies", type=lambda text: text.split(","), default=list(NAMES))
    parser.add_argument("--rounds", type=int, default=5, help="runs of each side that a median is taken of")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    return parser.parse_args()


def _traces(arguments: argparse.Namespace) -> Any:
    """Yield name, trace and capacities."""
    if arguments.conversation:
        loaded = load(str(arguments.conversation), keep_columns=False)
        yield "conversation", loaded.trace, [1000, 10_000, 50_000]
    capacities = [arguments.accesses // 1000, arguments.accesses // 100]
    yield "zipf", zipf_trace(arguments.accesses, arguments.accesses // 10), capacities


def _rows(
    peer: Peer, file: Path, trace: Trace, policies: list[str], capacities: list[int], rounds: int
) -> list[dict[str, Any]]:
    """Return hits and accesses per second by policy and capacity; our arrays are dense before the clock starts."""
    assert trace.next_accesses.size  # known beforehand, as to libCacheSim, which reads them from the file
    rows = []
    for policy in policies:
        replay(trace, REQUEST_POLICIES[policy](), capacities[0], "object")  # compiled before the clock starts
        for capacity in capacities:
            question = {"file": str(file), "policy": NAMES[policy], "capacity_blocks": capacity}
            powers = {power: peer.ask(**question, options={"hashpower": power})["replay_s"] for power in TABLE_POWERS}
            best_power = min(powers, key=lambda power: powers[power])
            asked = {"libcachesim": {}, "libcachesim_tuned": {"hashpower": best_power}}
            times: dict[str, list[float]] = {side: [] for side in ("pikv", *asked)}
            hits: dict[str, int] = {}
            for _ in range(rounds):
                for side, options in asked.items():
                    answer = peer.ask(**question, options=options)
                    times[side].append(answer["replay_s"])
                    hits[side] = answer["hits"]
                seconds, own = _timed(replay, trace, REQUEST_POLICIES[policy](), capacity, "object")
                times["pikv"].append(seconds)
                hits["pikv"] = own.block_hits
            assert hits["libcachesim"] == hits["libcachesim_tuned"]
            rows.append(
                {
                    "policy": policy,
                    "capacity_blocks": capacity,
                    "hits": {side: hits[side] for side in ("libcachesim", "pikv")},
                    "tuned_hashpower": best_power,
                    "accesses_per_s": {
                        side: trace.ids.size / statistics.median(seconds) for side, seconds in times.items()
                    },
                    "seconds": times,
                }
            )
            _say(f"{file.stem} {policy} {capacity}")
    return rows


def _sweep(peer: Peer, file: Path, measured: list[dict[str, Any]], rounds: int) -> list[dict[str, Any]]:
    """Return the seconds of several policies one after another, reading the file included, by capacity.

    measured: the rows of the same trace, for the hash table that suits each policy and capacity.
    """
    power = {(row["policy"], row["capacity_blocks"]): row["tuned_hashpower"] for row in measured}
    policies = [policy for policy in SWEEP if policy in {row["policy"] for row in measured}]
    rows = []
    for capacity in sorted({row["capacity_blocks"] for row in measured}):
        times: dict[str, list[float]] = {"libcachesim": [], "libcachesim_tuned": [], "pikv": []}
        for _ in range(rounds):
            for side in ("libcachesim", "libcachesim_tuned"):
                seconds = 0.0
                for policy in policies:
                    options = {"hashpower": power[policy, capacity]} if side == "libcachesim_tuned" else {}
                    question = {"file": str(file), "policy": NAMES[policy], "capacity_blocks": capacity}
                    answer = peer.ask(**question, options=options)
                    seconds += answer["open_s"] + answer["replay_s"]
                times[side].append(seconds)
            times["pikv"].append(_timed(_own_sweep, file, policies, capacity)[0])
        rows.append(
            {
                "policies": policies,
                "capacity_blocks": capacity,
                "median_s": {side: statistics.median(seconds) for side, seconds in times.items()},
                "seconds": times,
            }
        )
        _say(f"sweep {capacity}")
    return rows


def _own_sweep(file: Path, policies: list[str], capacity: int) -> list[int]:
    trace = load(str(file), keep_columns=False).trace
    return [replay(trace, REQUEST_POLICIES[policy](), capacity, "object").block_hits for policy in policies]


def _timed(function: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    """Return the CPU seconds of a call, which other work on the machine disturbs least, and what it returned."""
    began = time.process_time()
    found = function(*arguments)
    return time.process_time() - began, found


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
