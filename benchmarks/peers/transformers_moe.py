"""A training step of PiKV's mixture of experts beside transformers' Mixtral and Qwen3-MoE: tokens/s, loss, memory.

    python benchmarks/peers/transformers_moe.py [--device cuda] [--steps 10] [--threads 1]

Forward pass, losses, backward pass, clipping and optimizer, of models with the same weights on the same tokens, step by
step in turn (transformers_moe_steps.py). Times are medians: CPU time of the process on a CPU, wall time up to the
synchronised device on CUDA. Peak memory is that of a process which trains one contender alone: the most resident bytes
above those before its model was built, or what torch allocated on the device.
Returns 1 where the float32 losses differ by more than LOSS_TOLERANCE.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from peer import ROOT
from report import commit, machine
from transformers_moe_steps import ARCHITECTURES, COMPILED, SIDES, VOCABULARY, Step, contender
from transformers_moe_table import table

from pikv_core import __version__
from pikv_core.files import write_json, write_text

SAMPLES, CONTEXT = 8, 512
LOSS_TOLERANCE = 1e-4
WARM_STEPS = 3
MALLOC = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "LD_PRELOAD")  # told in the results; nothing sets them


def main() -> int:
    """Measure all contenders; write transformers_moe.json and .md, on CUDA transformers_moe_cuda.*."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    if arguments.peak:
        print(json.dumps(_peak_bytes(*arguments.peak, arguments.device)))
        return 0
    found: dict[str, Any] = {
        "machine": machine() if arguments.device == "cpu" else torch.cuda.get_device_name(),
        "device": arguments.device,
        "commit": arguments.commit or commit(),
        "versions": {
            "python": platform.python_version(),
            "pikv": __version__,
            **{name: importlib.metadata.version(name) for name in ("torch", "transformers", "numpy")},
        },
        "load_average": os.getloadavg(),
        "environment": {name: os.environ[name] for name in MALLOC if name in os.environ},
        "setting": {
            "samples": SAMPLES,
            "context_tokens": CONTEXT,
            "steps": arguments.steps,
            "threads": arguments.threads,
            "loss_tolerance": LOSS_TOLERANCE,
        },
        "results": {
            architecture: {
                precision: _measure(architecture, precision, arguments) for precision in arguments.precisions
            }
            for architecture in ARCHITECTURES
        },
    }
    shown = table(found)
    name = "transformers_moe" + ("" if arguments.device == "cpu" else f"_{arguments.device}")
    write_json(arguments.out / f"{name}.json", found)
    write_text(arguments.out / f"{name}.md", shown)
    print(shown)
    float32 = [found["results"][architecture].get("fp32", {}) for architecture in ARCHITECTURES]
    errors = [_spread([side["cross_entropy"] for side in sides.values()]) for sides in float32 if sides]
    return int(max(errors, default=0.0) > LOSS_TOLERANCE)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--steps", type=int, default=10, help="measured steps of each contender")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precisions", type=lambda text: text.split(","), default=list(SIDES), help="of fp32,bf16")
    parser.add_argument("--no-compile", action="store_true", help="leave out what torch compiles")
    parser.add_argument("--commit", help="what is measured, where there is no git repository")
    parser.add_argument("--peak", nargs=2, metavar=("ARCHITECTURE", "SIDE"), help="print this contender's memory alone")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    return parser.parse_args()


def _measure(architecture: str, precision: str, arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    print(f"measuring {architecture} in {precision}", file=sys.stderr, flush=True)
    sides = [side for side in SIDES[precision] if not (arguments.no_compile and COMPILED in side)]
    peaks = {side: _peak_of(architecture, side, arguments) for side in sides if COMPILED not in side}
    steps = {side: contender(architecture, side, arguments.device) for side in sides}
    losses = {side: step.cross_entropy(_ids(0)) for side, step in steps.items()}
    times: dict[str, list[float]] = {side: [] for side in steps}
    for number in range(WARM_STEPS + arguments.steps):
        for side, step in steps.items():
            times[side].append(_time(step, _ids(number)))
    return {
        side: {
            "step_ms": 1e3 * statistics.median(times[side][WARM_STEPS:]),
            "tokens_per_s": SAMPLES * CONTEXT / statistics.median(times[side][WARM_STEPS:]),
            "cross_entropy": losses[side],
            "peak_bytes": peaks.get(side, 0),
        }
        for side in steps
    }


def _time(step: Step, ids: np.ndarray) -> float:
    """Return the seconds of one step."""
    if step.device.type == "cpu":
        start = time.process_time()
        step.step(ids)
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    step.step(ids)
    torch.cuda.synchronize()
    return time.perf_counter() - start


def _ids(number: int) -> np.ndarray:
    return np.random.default_rng([0, number]).integers(VOCABULARY, size=(SAMPLES, CONTEXT))


def _peak_of(architecture: str, side: str, arguments: argparse.Namespace) -> int:
    """Return what `_peak_bytes` says in a process of its own."""
    command = [sys.executable, __file__, "--peak", architecture, side, "--device", arguments.device]
    command += ["--threads", str(arguments.threads)]
    return int(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]))


def _peak_bytes(architecture: str, side: str, device: str) -> int:
    """Return the most memory of some steps beyond that of the libraries."""
    transformers.logging.set_verbosity_error()
    before = _resident_bytes()
    step = contender(architecture, side, device)
    for number in range(WARM_STEPS):
        step.step(_ids(number))
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return _resident_bytes() - before


def _resident_bytes() -> int:
    """Return the most bytes of this program that were resident; getrusage would tell of its parent's, too."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def _spread(values: list[float]) -> float:
    return (max(values) - min(values)) / max(values)


if __name__ == "__main__":
    sys.exit(main())
