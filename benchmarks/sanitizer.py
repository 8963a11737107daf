"""The checks of `kernels_gpu.py` on small tensors under compute-sanitizer, where the machine has one.

    python benchmarks/sanitizer.py [--tiny]

runs the checks alone, which `sanitize` does once for memcheck (accesses outside a tensor) and once for racecheck
(threads that do not wait for each other), in processes of their own. `--tiny` is for Triton's interpreter.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TOOLS = ("memcheck", "racecheck")
TOOLKITS = ("/usr/local/cuda", "/opt/cuda")
TOLD_LINES = 40


def find_sanitizer() -> str | None:
    """Return the program: on PATH, in a CUDA toolkit, or in a package of NVIDIA's beside this Python's others."""
    toolkits = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")] + list(TOOLKITS)
    places = [Path(toolkit) / folder for toolkit in toolkits if toolkit for folder in ("bin", "compute-sanitizer")]
    packages = [Path(place) / "nvidia" for place in sys.path if place]
    places += [found.parent for package in packages for found in sorted(package.rglob("compute-sanitizer"))]
    return shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=os.pathsep.join(map(str, places))
    )


def sanitize(seconds: float) -> list[dict[str, Any]]:
    """Print and return what each tool said, all within some seconds: {"tool", "right" (None: unknown), "said"}."""
    program = find_sanitizer()
    if program is None:
        print("compute-sanitizer: there is none on this machine", flush=True)
        return []
    rows = []
    for tool in TOOLS:
        rows.append({"tool": tool} | run_under([program, "--tool", tool], seconds / len(TOOLS)))
        verdict = {True: "ok", False: "WRONG", None: "UNKNOWN"}[rows[-1]["right"]]
        print(f"compute-sanitizer {tool}: {verdict}: {rows[-1]['said']}", flush=True)
    return rows


def run_under(tool: list[str], seconds: float) -> dict[str, Any]:
    """Run the checks under a tool; return whether it found nothing, and its own lines where it did."""
    # Each tensor is an allocation of its own, so that one's end is not another's beginning.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [*tool, sys.executable, "-W", "ignore", __file__],
            stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True,
        )  # fmt: skip
        try:
            status = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return {"right": None, "said": f"not over after {seconds:g} s"}
        output.seek(0)
        lines = output.read().splitlines()
    summaries = [line for line in lines if re.search(r"SUMMARY: \d+", line)]
    if not summaries:
        return {"right": None, "said": "\n".join([f"exit status {status}, no summary", *lines[-TOLD_LINES:]])}
    if status == 0 and all(re.search(r"SUMMARY: 0\b", line) for line in summaries):
        return {"right": True, "said": summaries[-1].strip("= ")}
    own = [line for line in lines if line.startswith("=====")]
    return {"right": False, "said": "\n".join([f"exit status {status}", *own[:TOLD_LINES], summaries[-1]])}


def main() -> None:
    """Run the checks; exit with 1 where something failed or is wrong."""
    import kernels_gpu

    with tempfile.TemporaryDirectory() as folder:
        state = f"{folder}/state.json"
        run = kernels_gpu.Run(argparse.Namespace(state=state, json=None, seconds=3600, started=time.time()))
        kernels_gpu.do_checks(run, kernels_gpu.Inputs(1, 2, 4, 192, 64, 3))
    sys.exit(bool(run.state["errors"]) or not all(row["right"] for row in run.state["checks"]))


if __name__ == "__main__":
    main()
