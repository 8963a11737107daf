"""What students gain that were trained with a compressed cache: recall under their policy, three seeds.

    python benchmarks/cache_distill.py --runs runs/cache-distill-benchmark

A teacher of recipes/train/recall-tiny.yaml for each seed, students by recipes/train/cache-distill.yaml, and controls
that trained as long on the same losses without the cache, each swept by `pikv compress`. About half a CPU hour; runs
that are finished are not run again. It writes benchmarks/results/cache_distill.json and a section of docs/results.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from results_page import ROOT, commit, origin, put_section

HEADING = "## A model that learned to live with its cache"
RESULTS = ROOT / "benchmarks/results/cache_distill.json"
SEEDS = (0, 1, 2)
BUDGET = 0.25
NUM_QUERIES = 2000
RANDOM = ("train.selection_loss=0", "train.max_steps=300", "train.lr=0.003", "train.curriculum=[256]")
STUDENTS = {  # overrides of the recipe, the policy that counts, and what it is
    "control": (("train.cache=null", "train.selection_loss=0"), "tova", "the same steps without the cache"),
    "tova": ((), "tova", "with the cache, and the selection loss"),
    "tova-all": (("train.cache.budget=0.99",), "tova", "with the selection loss, 99 % of the context read"),
    "tova-alone": (("train.selection_loss=0",), "tova", "with the cache, without the selection loss"),
    "random-control": (("train.cache=null", *RANDOM), "random", "the same steps without the cache"),
    "random": (("train.cache.policy=random", *RANDOM), "random", "with the cache"),
}


def main() -> None:
    """Run what is missing, then write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, required=True, help="the folder of the runs")
    parser.add_argument("--threads", default="1")
    asked = parser.parse_args()
    rows = [row for seed in SEEDS for row in measure(asked.runs, seed, asked.threads)]
    last = json.loads((asked.runs / f"tova{SEEDS[-1]}" / "result.json").read_text(encoding="utf-8"))
    found = {**origin(last, commit()), "budget": BUDGET, "num_queries": NUM_QUERIES, "rows": rows}
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    put_section(HEADING, section())


def measure(runs: Path, seed: int, threads: str) -> list[dict[str, Any]]:
    """Return a row for the teacher and for each student of one seed: recall of the full cache and under each policy."""
    teacher = runs / f"teacher{seed}"
    shared = ["--threads", threads, "--seed", str(seed)]
    pikv(teacher, "train", "--recipe", "recipes/train/recall-tiny.yaml", *shared)
    rows = [{"seed": seed, "student": "teacher", **recalls(runs, f"teacher{seed}", threads)}]
    names = [f"train.init_from={teacher}", f"train.distill.teacher={teacher}"]
    for student, (overrides, _, _) in STUDENTS.items():
        sets = [part for override in (*names, *overrides) for part in ("--set", override)]
        pikv(runs / f"{student}{seed}", "train", "--recipe", "recipes/train/cache-distill.yaml", *shared, *sets)
        rows.append({"seed": seed, "student": student, **recalls(runs, f"{student}{seed}", threads)})
    return rows


def recalls(runs: Path, name: str, threads: str) -> dict[str, float]:
    """Return the recall of a run's model by policy."""
    out = runs / f"eval-{name}"
    pikv(
        out, "compress", "--model", str(runs / name), "--method", "tova,random,h2o", "--budget", str(BUDGET),
        "--tasks", "recall", "--threads", threads, "--set", f"num_queries={NUM_QUERIES}", "--set", "context_tokens=512",
    )  # fmt: skip
    found = json.loads((out / "result.json").read_text(encoding="utf-8"))["result"]["results"]
    return {row["policy"]: row["recall"] for row in found}


def pikv(out: Path, *arguments: str) -> None:
    """Run a verb into a folder, unless it stands there finished."""
    if not (out / "result.json").is_file():
        command = [sys.executable, "-m", "pikv_cli", *arguments, "--out", str(out)]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def section() -> list[str]:
    """Return the section of docs/results.md from the stored results."""
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    rows: list[dict[str, Any]] = found["rows"]

    def told(student: str, policy: str) -> str:
        values = [row[policy] for row in rows if row["student"] == student]
        return f"{statistics.mean(values):.3f} ({' '.join(f'{value:.3f}' for value in values)})"

    lines = [
        HEADING,
        "",
        f"Recall of {found['num_queries']:,} questions, asked after the context of 512 tokens was compressed to "
        f"{100 * found['budget']:.0f} %: the mean over seeds {', '.join(map(str, SEEDS))} of teacher and student, and "
        "each. Teachers are models of `recipes/train/recall-tiny.yaml` (drawn filler), from which students start, by "
        "`recipes/train/cache-distill.yaml`. Made by `benchmarks/cache_distill.py` on "
        f"{found['machine']}, commit {found['commit']}.",
        "",
        "| policy | model | recall at 25 % | full cache |",
        "|---|---|---|---|",
    ]
    for policy in ("tova", "random"):
        lines.append(f"| {policy} | teacher | {told('teacher', policy)} | {told('teacher', 'full')} |")
        for student, (_, own, text) in STUDENTS.items():
            if own == policy:
                lines.append(f"| {policy} | {text} | {told(student, policy)} | {told(student, 'full')} |")
    return [*lines, ""]


if __name__ == "__main__":
    main()
