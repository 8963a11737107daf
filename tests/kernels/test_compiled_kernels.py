"""What kernels compile to: no spills, shared memory that fits, and no more instructions than memory leaves time for.

`python -m pytest -s -m "slow or not slow" tests/kernels/test_compiled_kernels.py` prints what was found of each.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
TOLD = (
    "sm_{arch} d {head_dim:3} group {group:2}  {kernel:38} {registers:3} registers {spills} spills, {loop_spills} in a "
    "loop, {shared_bytes:6} B shared {instructions_per_number:6.2f} instructions a number, budget {budget}"
)
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}  # that a program can have
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kernels_compiled.py"


def compiled(*arguments):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", SCRIPT, "--json", *arguments], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(rows, spills="spills"):
    for row in rows:
        print(TOLD.format_map(row))
        assert row["registers"] > 0 and row["instructions_per_number"] > 0, row
        assert row[spills] == 0, row
        assert row["shared_bytes"] <= SHARED_BYTES[row["arch"]], row
        assert row["budget"] is None or row["instructions_per_number"] <= row["budget"], row


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["90", "80"])
def test_at_the_shapes_of_llama(arch):
    rows = compiled("--arch", arch)
    check(rows)
    assert len({row["kernel"] for row in rows}) == len(rows) == 20
    assert sum(row["budget"] is not None for row in rows) >= 13


@pytest.mark.slow
@pytest.mark.parametrize(("head_dims", "group"), [(("64", "256"), "16"), (("80",), "1")])
def test_on_two_architectures_at_other_head_dims_and_groups(head_dims, group):
    rows = compiled("--arch", "80", "90", "--head-dim", *head_dims, "--group", group)
    check(rows, "loop_spills")  # a value or two may be set aside for what follows the loop
    assert len(rows) == 2 * len(head_dims) * (20 if int(group) <= 8 else 19)  # int2 takes no more query rows
