"""PiKV beside kvcache-simulator 0.1.3: token hits on the same trace, and the time of both command lines.

    python benchmarks/peers/kvcache_simulator.py --trace ../shared/traces/mooncake_conversation_trace.jsonl

kvcache-simulator runs in .venv-kvcache-simulator or where --env says, with its C++ core, which its first run compiles;
PiKV's first run compiles its loops. Both count the tokens of the second half of the requests.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from kvcache_simulator_table import table
from peer import ROOT, Peer, peer_python
from report import commit, machine

from pikv_core.files import write_json, write_text
from pikv_core.runs import versions
from pikv_core.simulation.curve import curve
from pikv_core.simulation.load import load
from pikv_core.simulation.metrics import hit_tokens
from pikv_core.simulation.policies import REQUEST_POLICIES
from pikv_core.simulation.replay import Touch, replay
from pikv_core.simulation.trace import Trace

PACKAGES = ("kvcache-simulator==0.1.3",)
CHILD = Path(__file__).parent / "kvcache_simulator_side" / "child.py"
BLOCK_TOKENS = 512
# Theirs, ours, and the order in which ours touches. Its optimum may leave a block out, ours takes every block in.
PAIRS: dict[str, tuple[str, Touch]] = {
    "lru": ("lru", "reverse"),
    "fifo": ("fifo", "forward"),
    "optimal": ("belady-leaf", "reverse"),
}
TIMED_CAPACITIES = [1000, 5000, 10_000, 30_000, 50_000]
MODEL = "deepseek-v4-pro"  # its command line takes bytes, and a model that tells the bytes of a block


def main() -> int:
    """Measure both sides, write kvcache_simulator.json and .md; return 1 where hits differ that must not."""
    arguments = _arguments()
    python = arguments.env or peer_python("kvcache-simulator", PACKAGES)
    load_before = os.getloadavg()
    with tempfile.TemporaryDirectory() as folder, Peer(python, CHILD) as peer:
        file = Path(folder) / "trace.jsonl"
        shutil.copyfile(arguments.trace, file)
        trace = load(str(file), keep_columns=False).trace
        longest = int(trace.blocks_per_request.max())
        capacities = [int(blocks) for blocks in np.unique(np.geomspace(50, trace.num_blocks, 60).astype(np.int64))]
        found: dict[str, Any] = {"machine": machine(), "commit": commit(), "load_average": load_before}
        found |= {"pikv": versions(), "kvcache-simulator": peer.ask(), "rounds": arguments.rounds}
        found |= {
            "num_requests": trace.num_requests,
            "num_accesses": int(trace.ids.size),
            "num_blocks": trace.num_blocks,
        }
        found |= {"longest_request_blocks": longest, "hits": _hits(peer, file, trace, capacities)}
        found["replay"] = _replay_times(peer, file, trace, arguments.rounds)
        found["command_line"] = _command_lines(python, file, Path(folder), arguments.rounds)
    write_json(arguments.out / "kvcache_simulator.json", found)
    write_text(arguments.out / "kvcache_simulator.md", table(found))
    print(table(found))
    must = [row for row in found["hits"] if row["policy"] == "lru" and row["capacity_blocks"] > longest]
    return int(any(row["kvcache-simulator"] != row["pikv"] for row in must))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, required=True, help="mooncake jsonl")
    parser.add_argument("--env", type=Path, help="the Python of an environment with kvcache-simulator 0.1.3")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each side that a median is taken of")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    return parser.parse_args()


def _hits(peer: Peer, file: Path, trace: Trace, capacities: list[int]) -> list[dict[str, Any]]:
    """Return both sides' hit tokens by policy and capacity, without those that kvcache-simulator leaves out."""
    theirs = peer.ask(trace=str(file), block_tokens=BLOCK_TOKENS, capacities=capacities, policies=list(PAIRS))
    warm_up = theirs["warm_up_requests"]
    assert theirs["measured_tokens"] == int(trace.input_tokens[warm_up:].sum())
    rows = []
    for policy, (name, touch) in PAIRS.items():
        for capacity, tokens in zip(capacities, theirs["hit_tokens"][policy], strict=True):
            if tokens is None:
                continue
            own = replay(trace, REQUEST_POLICIES[name](), capacity, touch=touch).hits
            rows.append(
                {
                    "policy": policy,
                    "pikv_policy": name,
                    "capacity_blocks": capacity,
                    "kvcache-simulator": tokens,
                    "pikv": int(hit_tokens(trace, own)[warm_up:].sum()),
                }
            )
    return rows


def _replay_times(peer: Peer, file: Path, trace: Trace, rounds: int) -> dict[str, Any]:
    """Return median CPU seconds of reading, of lru at the timed capacities, and of our curve of all capacities."""
    times: dict[str, dict[str, list[float]]] = {
        "read": {"kvcache-simulator": [], "pikv": []},
        "replay": {"kvcache-simulator": [], "pikv": []},
        "curve": {"pikv": []},
    }
    curve(trace)
    for _ in range(rounds):
        theirs = peer.ask(trace=str(file), block_tokens=BLOCK_TOKENS, capacities=TIMED_CAPACITIES, policies=["lru"])
        times["read"]["kvcache-simulator"].append(theirs["read_s"])
        times["replay"]["kvcache-simulator"].append(theirs["replay_s"])
        began = time.process_time()
        load(str(file), keep_columns=False)
        read = time.process_time()
        for capacity in TIMED_CAPACITIES:
            replay(trace, REQUEST_POLICIES["lru"](), capacity)
        replayed = time.process_time()
        curve(trace)
        ended = time.process_time()
        times["read"]["pikv"].append(read - began)
        times["replay"]["pikv"].append(replayed - read)
        times["curve"]["pikv"].append(ended - replayed)
    return {
        what: {
            side: {"median_cpu_s": statistics.median(seconds), "cpu_seconds": seconds}
            for side, seconds in sides.items()
        }
        for what, sides in times.items()
    }


def _command_lines(python: Path, file: Path, folder: Path, rounds: int) -> dict[str, Any]:
    """Return the seconds of both command lines, lru at the timed capacities: compiling first, then warm."""
    theirs = [python.parent / "kvcache-simulator", "run", "--trace", file, "--block-size", str(BLOCK_TOKENS)]
    theirs += ["--model", MODEL, "--policies", "lru", "--format", "json"]
    bytes_per_block = json.loads(_run(theirs, {})[2])["metadata"]["bytesPerBlock"]
    budgets = ",".join(repr((blocks + 0.5) * bytes_per_block / 2**30) for blocks in TIMED_CAPACITIES)
    theirs += ["--budgets-gib", budgets]
    capacities = ",".join(map(str, TIMED_CAPACITIES))
    ours = [Path(sys.executable).parent / "pikv", "simulate-cache", file, "--policy", "lru", "--capacity", capacities]
    ours += ["--out", folder / "run", "--json"]
    ours += ["--set", "keep_columns=false"]  # the trace is parsed by both every time
    sides = {"kvcache-simulator": (theirs, "TMPDIR"), "pikv": (ours, "NUMBA_CACHE_DIR")}
    cold: dict[str, list[tuple[float, ...]]] = {side: [] for side in sides}
    warm: dict[str, list[tuple[float, ...]]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side, (command, variable) in sides.items():
            with tempfile.TemporaryDirectory(dir=folder) as compiled:
                shutil.rmtree(folder / "run", ignore_errors=True)
                cold[side].append(_run(command, {variable: compiled})[:2])
                shutil.rmtree(folder / "run", ignore_errors=True)
                *seconds, answer = _run(command, {variable: compiled})
            warm[side].append(tuple(seconds))
            assert _capacities(json.loads(answer)) == TIMED_CAPACITIES
    return {
        what: {side: _summary(seconds) for side, seconds in times.items()}
        for what, times in (("cold", cold), ("warm", warm))
    }


def _run(command: list[Any], variables: dict[str, str]) -> tuple[float, float, str]:
    """Return seconds, CPU seconds and stdout."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **variables})
    ended, after = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    return ended - began, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout


def _capacities(answer: dict[str, Any]) -> list[int]:
    if "points" in answer:
        return [point["cacheBlocks"] for point in answer["points"]]
    return [row["capacity_blocks"] for row in answer["results"]]


def _summary(runs: list[tuple[float, ...]]) -> dict[str, Any]:
    seconds, cpu_seconds = zip(*runs, strict=True)
    return {
        "median_s": statistics.median(seconds),
        "median_cpu_s": statistics.median(cpu_seconds),
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
    }


if __name__ == "__main__":
    sys.exit(main())
