"""What loading needs at its peak: at most 40 bytes per access and 200 per distinct block."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pikv_core.simulation.readers.oracle_general import RECORD

ACCESSES = 3_000_000
PER_REQUEST = 20
PROGRAM = """
import resource, sys
from pikv_core.simulation.load import load

load(sys.argv[1], keep_columns=False)  # what is compiled and imported on the way is not the trace's
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
trace = load(sys.argv[2], keep_columns=False).trace
growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(1024 * growth, trace.ids.size, trace.num_blocks)
"""


def write_records(file: Path, ids: np.ndarray) -> None:
    records = np.zeros(ids.size, RECORD)
    records["time_s"], records["id"], records["next"] = np.arange(ids.size) // 100, ids, -1
    records.tofile(file)


def write_lines(file: Path, ids: np.ndarray) -> None:
    with open(file, "w") as lines:
        for first in range(0, ids.size, PER_REQUEST):
            record = {"timestamp": first, "input_length": 9, "output_length": 1}
            lines.write(json.dumps({**record, "hash_ids": ids[first : first + PER_REQUEST].tolist()}) + "\n")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux")
@pytest.mark.parametrize("write", [write_records, write_lines])
def test_peak(tmp_path: Path, write: object) -> None:
    assert callable(write)
    ids = np.random.default_rng(0).zipf(1.2, ACCESSES) % 400_000
    write(tmp_path / "warm", ids[:100_000])
    write(tmp_path / "whole", ids)
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "warm"), str(tmp_path / "whole")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    growth_bytes, num_accesses, num_blocks = (int(word) for word in done.stdout.split())
    assert num_accesses == ACCESSES
    assert growth_bytes <= 40 * num_accesses + 200 * num_blocks
