"""The GPU script's code runs through on small tensors, and one failing step stops no other."""

import argparse
import json
import runpy
import subprocess
import sys
import time
from pathlib import Path

import pytest
from kernel_checks import CPU

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kernels_gpu.py"
pytestmark = CPU


def test_a_failing_step_is_told_and_the_next_one_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--tiny"])  # which leaves the interpreter on
    script = runpy.run_path(str(SCRIPT), run_name="script")
    state = tmp_path / "state.json"
    arguments = argparse.Namespace(state=str(state), json=None, seconds=60, started=time.time())
    run = script["Run"](arguments)
    run.step("first", lambda: 1 / 0)
    run.step("second", lambda: run.state["checks"].append("done"))
    assert "FAILED first: ZeroDivisionError: division by zero (test_gpu_script.py" in capsys.readouterr().out
    again = script["Run"](arguments)  # as a process that goes on from the file
    again.step("second", lambda: 1 / 0)
    assert again.state["done"] == ["first", "second"] and again.state["checks"] == ["done"]
    assert [error["step"] for error in again.state["errors"]] == ["first"]


@pytest.mark.slow
def test_all_of_it_on_small_tensors(tmp_path):
    written = tmp_path / "out.json"
    command = [sys.executable, "-W", "ignore", SCRIPT, "--tiny", "--seconds", "600", "--json", written]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(written.read_text())
    assert not found["errors"] and all(row["right"] for row in found["checks"])
    assert len(found["checks"]) > 50 and len(found["times"]) == 22 and len(found["cuts"]) == 37
