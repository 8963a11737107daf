"""What a second process gains in training: tokens per second of two of one thread each, as a ratio to one.

    python benchmarks/train_scaling.py [--steps 20] [--rounds 3]

The model of benchmarks/peers/transformers_moe.py, on the embedded text; the settings take turns, and what is told are
medians over rounds. Results go to benchmarks/results/train_scaling.json and .md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from peers.report import commit, machine

RESULTS = Path(__file__).parent / "results"
LENGTH = 512
TOKENS = 8 * LENGTH  # a step, of one process
MODEL = ["arch=pikv", "num_layers=4", "hidden_size=256", "num_heads=4", "num_kv_heads=2", "num_experts=8"]
MODEL += ["expert_size=512", "max_positions=512", "attention_bias=false"]
DTYPES = ("float32", "bfloat16")
# By name: processes, tokens of a step over all of them, ranks that share experts.
SETTINGS = {
    "one process": (1, TOKENS, 1),
    "two, same local batch": (2, 2 * TOKENS, 1),
    "two, same local batch, experts shared out": (2, 2 * TOKENS, 2),
    "two, same global batch": (2, TOKENS, 1),
}


def main() -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    found: dict[str, dict[str, list[float]]] = {dtype: {name: [] for name in SETTINGS} for dtype in DTYPES}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        run([sys.executable, "-m", "pikv_cli", "gen-data", "text", "--set", "task.vocab_size=4096", "--out", str(data)])
        for number in range(arguments.rounds):
            for dtype, speeds in found.items():
                for name, (count, tokens, expert_ranks) in SETTINGS.items():
                    out = Path(folder) / f"{number}-{dtype}-{len(speeds[name])}-{name.replace(' ', '-')}"
                    speeds[name].append(tokens_per_s(count, tokens, expert_ranks, dtype, data, arguments.steps, out))
    told = {"machine": machine(), "commit": commit(), "steps": arguments.steps, "tokens_per_s": found}
    (RESULTS / "train_scaling.json").write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    (RESULTS / "train_scaling.md").write_text(table(told), encoding="utf-8")
    print(table(told))


def tokens_per_s(count: int, tokens: int, expert_ranks: int, dtype: str, data: Path, steps: int, out: Path) -> float:
    """Return what a run tells of its speed over all processes, each of one thread."""
    given = [f"model.{size}" for size in MODEL]
    given += ["data.task={name: text, vocab_size: 4096}", f"data.path={data}", f"dtype={dtype}"]
    given += [f"train.batch_tokens={tokens}", f"train.max_steps={steps}", f"train.decay_steps={steps}"]
    given += [f"train.curriculum=[{LENGTH}]", f"train.eval_lengths=[{LENGTH}]", "train.eval_samples=1"]
    given += ["train.optimizer=adamw", f"train.parallel.expert_ranks={expert_ranks}", f"train.log_every={steps}"]
    start = [sys.executable]
    if count > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    words = [word for setting in given for word in ("--set", setting)]
    run([*start, "-m", "pikv_cli", "train", "--threads", "1", "--out", str(out), *words])
    return float(json.loads((out / "result.json").read_text(encoding="utf-8"))["result"]["tokens_per_s"])


def run(command: list[str]) -> None:
    """Run a command of one thread; what it says is told where it fails."""
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)


def table(told: dict[str, Any]) -> str:
    """Return the medians and their ratios to one process as Markdown."""
    lines = [
        f"{told['machine']}; commit {told['commit']}; {told['steps']} steps a run; medians of "
        f"{len(next(iter(told['tokens_per_s']['float32'].values())))} runs, tokens/s",
        "",
        f"| processes of one thread | {' | '.join(f'{dtype} | ×' for dtype in told['tokens_per_s'])} |",
        f"|---|{'---:|' * 2 * len(told['tokens_per_s'])}",
    ]
    medians = {
        dtype: {name: statistics.median(speeds) for name, speeds in by_name.items()}
        for dtype, by_name in told["tokens_per_s"].items()
    }
    for name in next(iter(medians.values())):
        cells = [f"{one[name]:,.0f} | {one[name] / one['one process']:.2f}" for one in medians.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
