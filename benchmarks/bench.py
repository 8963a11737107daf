"""Measure all that a CPU can, one benchmark after the other, and put the figures where they are read.

    python benchmarks/bench.py [--only decode,kernels,prefill]        (or: make bench)

Each runs in a process of its own on one thread; decode and kernels again on two, for information. Everything goes to
benchmarks/results/<machine>-<date>.json, and from there into the README and docs/performance.md (figures.py). Other
work on the machine shows in the quartiles.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import figures
from peers.report import machine

from pikv_core.files import write_json

HERE = Path(__file__).parent
RUNS = {
    "decode": ("decode.py", 1),
    "decode on two threads": ("decode.py", 2),
    "kernels": ("kernels_cpu.py", 1),
    "kernels on two threads": ("kernels_cpu.py", 2),
    "prefill": ("prefill.py", 1),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="decode,kernels,prefill")
    asked = parser.parse_args().only.split(",")
    today = datetime.date.today().isoformat()
    path = HERE / "results" / f"{re.sub(r'[^a-z0-9]+', '-', machine().lower())}-{today}.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    found |= {"machine": machine(), "date": today}
    for name, (script, threads) in RUNS.items():
        if name.split()[0] in asked:
            found[name] = measured(script, threads)
            write_json(path, found)
    figures.main([])


def measured(script: str, threads: int) -> dict:
    """Run one benchmark, which prints its tables, and return what it found."""
    limits = {name: str(threads) for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS")}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        words = [sys.executable, HERE / script, "--threads", str(threads), "--json", file]
        subprocess.run(words, check=True, env={**os.environ, **limits})
        return json.loads(file.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
