"""How fast the curves of a long trace are, and how much memory a study of ten million accesses takes.

    python benchmarks/simulation_scale.py --sessions ../shared/traces/kv-cache-tester [--out FILE]

Speed: recorded agent sessions, repeated with ids of their own and interleaved in time; one thread, medians. Memory:
processes that read a file and replay it; the peak beyond what they hold after imports and compilation, against
40 bytes an access and 200 a distinct block. Prints one JSON object; exits with 1 where a limit is missed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pikv_core.files import make_folder, write_json
from pikv_core.runs import versions
from pikv_core.simulation.ceiling import ceiling_hits
from pikv_core.simulation.curve import curve
from pikv_core.simulation.load import load
from pikv_core.simulation.policies import REQUEST_POLICIES
from pikv_core.simulation.replay import replay
from pikv_core.simulation.shards import sampled_curve
from pikv_core.simulation.trace import Trace, make_trace

BYTES_PER_ACCESS, BYTES_PER_BLOCK = 40, 200
ACCESSES_PER_S = 10e6  # of the prefix curve, in processor seconds
MOONCAKE_BLOCK_TOKENS = 512
CURVES: dict[str, Callable[[Trace], Any]] = {
    "prefix curve": curve,
    "prefix curve, touched forward": lambda trace: curve(trace, "forward"),
    "object curve": lambda trace: curve(trace, semantics="object"),
    "object curve, sample of 0.01": lambda trace: sampled_curve(trace, 0.01),
    "ceiling": lambda trace: ceiling_hits(trace, "prefix"),
}


def _replay(name: str) -> Callable[[Trace], Any]:
    """Return the replay of a policy at a tenth of the distinct blocks."""
    return lambda trace: replay(trace, REQUEST_POLICIES[name](), max(1, trace.num_blocks // 10))


STAGES: dict[str, Callable[[Trace], Any]] = {
    "load": lambda trace: None,
    "curve": curve,
    **{name: _replay(name) for name in ("lru", "s3fifo", "belady")},
}


def main() -> int:
    """Measure, print and write what was asked for."""
    arguments = _arguments()
    if arguments.child:
        print(json.dumps(_peak_bytes(arguments.child[0], arguments.child[1].split(","))))
        return 0
    result: dict[str, Any] = {
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "versions": versions(),
        "backend": "numba, one thread",
        "memory": [],
    }
    sessions = load(arguments.sessions).trace if arguments.sessions else None
    if sessions is not None:
        result["speed"] = _speed(repeated(sessions, arguments.accesses), arguments.rounds)
    with tempfile.TemporaryDirectory() as folder:
        shapes = {"agent sessions": sessions, "many distinct blocks": _conversations(arguments.memory_accesses // 10)}
        for shape, trace in shapes.items():
            if trace is not None:
                file = make_folder(Path(folder) / shape.replace(" ", "-")) / "requests.jsonl"
                whole = repeated(trace, arguments.memory_accesses)
                _write_mooncake(whole, file)
                result["memory"].append({"shape": shape, **_sizes(whole), "peaks": _peaks(file, whole)})
    print(json.dumps(result, indent=2))
    if arguments.out:
        write_json(arguments.out, result)
    return 0 if _within_limits(result) else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", help="a folder of kv-cache-tester sessions; without it no speed is measured")
    parser.add_argument("--accesses", type=int, default=94_000_000, help="of the trace whose curves are timed")
    parser.add_argument("--memory-accesses", type=int, default=10_000_000, help="of the traces whose memory is told")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", help="a JSON file")
    parser.add_argument("--child", nargs=2, metavar=("FILE", "STAGES"), help=argparse.SUPPRESS)
    return parser.parse_args()


def repeated(trace: Trace, accesses: int) -> Trace:
    """Return copies of a trace with blocks of their own, each begun within the first hour, until there are enough."""
    copies = math.ceil(accesses / trace.ids.size)
    begins_ms = np.random.default_rng(0).uniform(0, 3.6e6, copies)
    timestamps_ms = (begins_ms[:, None] + trace.timestamps_ms).ravel()
    order = np.argsort(timestamps_ms, kind="stable")
    source = order % trace.num_requests
    starts = np.zeros(order.size + 1, np.int64)
    np.cumsum(trace.blocks_per_request[source], out=starts[1:])
    ids = np.empty(starts[-1], np.int32)
    for place, (copy, request) in enumerate(zip(order // trace.num_requests, source)):
        blocks = trace.ids[trace.starts[request] : trace.starts[request + 1]]
        ids[starts[place] : starts[place + 1]] = blocks + copy * trace.num_blocks
    return dataclasses.replace(
        trace,
        ids=ids,
        starts=starts,
        timestamps_ms=timestamps_ms[order],
        input_tokens=trace.input_tokens[source],
        output_tokens=trace.output_tokens[source],
        num_blocks=copies * trace.num_blocks,
        category=np.broadcast_to(np.int16(0), order.size),
        turn=np.broadcast_to(np.int32(0), order.size),
        parent=np.broadcast_to(np.int64(-1), order.size),
    )


def _conversations(accesses: int) -> Trace:
    """Return requests with ten blocks of one of a hundred beginnings and twenty of their own."""
    random = np.random.default_rng(1)
    shared = (10 * random.integers(0, 100, accesses // 30)[:, None] + np.arange(10)).tolist()
    return make_trace([[*begin, *range(1000 + 20 * at, 1020 + 20 * at)] for at, begin in enumerate(shared)])


def _sizes(trace: Trace) -> dict[str, int]:
    return {"accesses": trace.ids.size, "distinct_blocks": trace.num_blocks, "requests": trace.num_requests}


def _speed(trace: Trace, rounds: int) -> dict[str, Any]:
    """Return what each curve takes; the first call, on two requests, takes what compilation or its cache takes."""
    rows = []
    for name, count in CURVES.items():
        first_s, _ = _seconds(count, make_trace([[0, 1], [0]]))
        wall, cpu = zip(*(_seconds(count, trace) for _ in range(rounds)))
        rows.append(
            {
                "what": name,
                "first_call_s": round(first_s, 3),
                "run_s": round(statistics.median(wall), 3),
                "cpu_s": round(statistics.median(cpu), 3),  # of the one thread: neighbours hardly change it
                "accesses_per_cpu_s": round(trace.ids.size / statistics.median(cpu)),
            }
        )
    return {**_sizes(trace), "rows": rows}


def _seconds(work: Callable[[Trace], Any], trace: Trace) -> tuple[float, float]:
    """Return wall and processor seconds."""
    began, began_cpu = time.perf_counter(), time.process_time()
    work(trace)
    return time.perf_counter() - began, time.process_time() - began_cpu


def _write_mooncake(trace: Trace, file: Path) -> None:
    """Write the requests as mooncake's; prompts fill their blocks."""
    with file.open("w") as stream:
        for request in range(trace.num_requests):
            blocks = trace.ids[trace.starts[request] : trace.starts[request + 1]].tolist()
            record = {
                "timestamp": int(trace.timestamps_ms[request]),
                "input_length": MOONCAKE_BLOCK_TOKENS * len(blocks),
                "output_length": 0,
                "hash_ids": blocks,
            }
            stream.write(json.dumps(record) + "\n")


def _peaks(file: Path, trace: Trace) -> list[dict[str, Any]]:
    """Return the peak of each stage in a process of its own, and of all in one.

    The first process keeps the columns for the next ones.
    """
    allowed = BYTES_PER_ACCESS * trace.ids.size + BYTES_PER_BLOCK * trace.num_blocks
    rows = []
    for stages, source in [
        ("load", "file"),
        *((stage, "kept columns") for stage in STAGES),
        (",".join(STAGES), "file"),
    ]:
        if source == "file":
            for kept in set(file.parent.iterdir()) - {file}:
                kept.unlink()
        command = [sys.executable, __file__, "--child", str(file), stages]
        told = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        rows.append(
            {
                "stages": stages.replace(",", " + "),
                "columns_from": told["columns_from"],
                "peak_bytes": told["peak_bytes"],
                "bytes_per_access": round(told["peak_bytes"] / trace.ids.size, 1),
                "share_of_limit": round(told["peak_bytes"] / allowed, 3),
                "run_s": told["run_s"],
            }
        )
    return rows


def _peak_bytes(file: str, stages: list[str]) -> dict[str, Any]:
    """Run the stages on a file and return the growth of this process beyond a first run on a few requests."""
    with tempfile.TemporaryDirectory() as folder:
        small = Path(folder) / "small.jsonl"
        _write_mooncake(make_trace([[0, 1], [0, 2]]), small)
        _run(str(small), stages)
    before = _resident_peak_bytes()
    began = time.perf_counter()
    columns_from = _run(file, stages)
    seconds = time.perf_counter() - began
    peak_bytes = _resident_peak_bytes() - before
    return {"columns_from": columns_from, "peak_bytes": peak_bytes, "run_s": round(seconds, 2)}


def _resident_peak_bytes() -> int:
    """Return the most memory this process has held; getrusage would count what its parent held before, too."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def _run(file: str, stages: list[str]) -> str:
    loaded = load(file)
    for stage in stages:
        STAGES[stage](loaded.trace)
    return "kept columns" if loaded.from_kept_columns else "file"


def _within_limits(result: dict[str, Any]) -> bool:
    slow = [row for row in result.get("speed", {"rows": []})["rows"][:1] if row["accesses_per_cpu_s"] < ACCESSES_PER_S]
    large = [row for shape in result["memory"] for row in shape["peaks"] if row["share_of_limit"] > 1]
    for row in slow + large:
        print(f"limit missed: {row}", file=sys.stderr)
    return not slow and not large


if __name__ == "__main__":
    sys.exit(main())
