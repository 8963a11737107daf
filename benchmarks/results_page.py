"""Write docs/results.md from finished sweeps of recipes/compress/frontier.yaml, and keep their rows beside it.

    python benchmarks/results_page.py --after runs/frontier-1 --inside runs/frontier-2

Every number is one of the sweeps'; machine, versions and commit are those of the run. Rows go to
benchmarks/results/frontier-*.json, pictures to docs/.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
COLUMNS = ("method", "budget", "resident_bytes", "full_bytes", "recall", "recall_interval", "recall_by_depth")
COLUMNS += ("perplexity", "agreement", "agreement_kl", "attention_error", "attention_mass")
SHARES = (0.5, 0.25, 0.12)  # of the full cache's bytes
SLACK = 1.05  # a budget in tokens is met in bytes to within positions, scores and a unit of codes


def main() -> None:
    """Read the sweeps named on the command line and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--after", type=Path, required=True, help="the run with the question after the context")
    parser.add_argument("--inside", type=Path, required=True, help="the run with the question inside")
    parser.add_argument("--commit", default=commit(), help="the commit that the sweeps ran at")
    asked = parser.parse_args()
    runs = {"after": _read(asked.after), "inside": _read(asked.inside)}
    for question, run in runs.items():
        rows = [{name: row[name] for name in COLUMNS} for row in run["result"]["results"]]
        kept = {**origin(run, asked.commit), **{key: run["result"][key] for key in ("question", "num_queries")}}
        path = ROOT / f"benchmarks/results/frontier-{question}.json"
        path.write_text(json.dumps({**kept, "rows": rows}, indent=1) + "\n", encoding="utf-8")
        shutil.copy(getattr(asked, question) / "pareto.png", ROOT / f"docs/frontier-{question}.png")
    page = ROOT / "docs/results.md"
    _, heading, training = page.read_text(encoding="utf-8").partition("## A model that learned")
    page.write_text(_page(runs, asked.commit).rstrip() + "\n\n" + heading + training, encoding="utf-8")


def _read(folder: Path) -> dict[str, Any]:
    run = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    for row in run["result"]["results"]:
        row["share"] = row["resident_bytes"] / row["full_bytes"]
    return run


def origin(run: dict[str, Any], commit: str) -> dict[str, Any]:
    cpu = next(
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    )
    return {"machine": f"{cpu}, {platform.system()}", "versions": run["versions"], "commit": commit}


def commit() -> str:
    return subprocess.run(
        ["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()


def put_section(heading: str, lines: list[str]) -> None:
    """Put a section into the page, in place of the one with its heading, or at the end."""
    page = ROOT / "docs/results.md"
    page.write_text(with_section(page.read_text(encoding="utf-8"), heading, lines), encoding="utf-8")


def with_section(page: str, heading: str, lines: list[str]) -> str:
    """Return a page with the section, which ends where the next of its level begins."""
    before, _, old = page.partition(f"\n{heading}\n")
    _, following, after = old.partition("\n## ")
    return before.rstrip() + "\n\n" + "\n".join(lines).rstrip() + "\n" + following + after


def _page(runs: dict[str, dict[str, Any]], commit: str) -> str:
    after, inside = (runs[question]["result"] for question in ("after", "inside"))
    full = {question: run["result"]["results"][0] for question, run in runs.items()}
    made = origin(runs["after"], commit)
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    return "\n".join(
        [
            "# Quality against bytes",
            "",
            "The model of `recipes/train/text-recall.yaml` (llama, 4 layers, 2 key/value heads of 64), 1,024 tokens of "
            f"real text with needles, bfloat16 model and cache, answers one token per step. Recall of "
            f"{after['num_queries']:,} questions with its 95 % interval; perplexity is that of {after['perplexity_of']}"
            " behind 1,024 tokens of it; agreement is the share of next tokens on which the full cache's greedy choice "
            "is kept, KL (nats) how far the distributions are. Bytes are of live storage, positions, scores and scales "
            "included, over those of transformers' own cache for the same tokens and dtype.",
            "",
            f"Made by `recipes/compress/frontier.yaml` and `benchmarks/results_page.py` on {made['machine']}, "
            f"{versions}, commit {commit}.",
            "",
            "The needles are marked by a token of their own, which helps scores that look for unusual keys (keydiff, "
            "expected-attention) and hurts none; text without marks is harder for them.",
            "",
            "## The question comes after",
            "",
            "The policy compresses the context alone and does not know what will be asked. All questions of a context "
            "are asked in turn through one cache: what is fed for them counts against its budget, and takes the place "
            "of context under every policy that drops tokens.",
            "",
            *_best(after["results"], full["after"]),
            "",
            "![recall and perplexity over bytes, question after](frontier-after.png)",
            "",
            *_table(after["results"]),
            "",
            *_skipped(after),
            "## The question is inside",
            "",
            "Each question ends its prompt while the policy observes, and is then asked through what is left.",
            "",
            *_best(inside["results"], full["inside"]),
            "",
            "![recall over bytes, question inside](frontier-inside.png)",
            "",
            *_table(inside["results"]),
            "",
            *_skipped(inside),
        ]
    )


def _best(rows: list[dict[str, Any]], full: dict[str, Any]) -> list[str]:
    """List the best recall within each share of the bytes, beside the full cache and what it is compared with."""
    lines = ["| bytes, at most | best | recall | random | kvzip | oracle |", "|---|---|---|---|---|---|"]
    for share in SHARES:
        within = [row for row in rows if row["share"] <= share * SLACK]
        own = [row for row in within if row["policy"] != "oracle"]
        best = max(own, key=lambda row: (row["recall"], -row["share"]))
        peers = []
        for name in ("random", "kvzip", "oracle"):
            of_peer = [row["recall"] for row in within if row["policy"] == name]
            peers.append(f"{max(of_peer):.3f}" if of_peer else "")
        lines.append(
            f"| {share} | {best['method']} at {best['budget']} ({best['share']:.3f}) | {_recall(best)} | "
            + " | ".join(peers)
            + " |"
        )
    near = [row for row in rows if row["policy"] != "oracle" and row["recall"] >= full["recall"] - 0.01]
    least = min(near, key=lambda row: row["share"])
    return [
        *lines,
        "",
        f"Full cache: {_recall(full)}. Fewest bytes within one point of it: {least['method']} at {least['budget']}, "
        f"{least['share']:.3f} of the bytes, {_recall(least)}.",
    ]


def _table(rows: list[dict[str, Any]]) -> list[str]:
    names = [name for name in ("perplexity", "agreement", "agreement_kl") if rows[0][name] is not None]
    lines = [
        f"| method | budget | bytes / full | recall | by depth, first to last fifth | {' | '.join(names)} |",
        "|---|---|---|---|---|" + "---|" * max(1, len(names)),
    ]
    for row in rows:
        depths = " ".join("-" if value is None else f"{value:.2f}" for value in row["recall_by_depth"])
        more = " | ".join(f"{row[name]:.4g}" for name in names)
        lines.append(f"| {row['method']} | {row['budget']} | {row['share']:.3f} | {_recall(row)} | {depths} | {more} |")
    return lines


def _recall(row: dict[str, Any]) -> str:
    return f"{row['recall']:.4f} ± {row['recall_interval']:.4f}"


def _skipped(result: dict[str, Any]) -> list[str]:
    return [f"Left out: {cell['method']} at {cell['budget']}: {cell['reason']}.\n" for cell in result["skipped"]]


if __name__ == "__main__":
    main()
