"""The learned scorer beside policies that know as little of what will be asked, and beside those that look again.

    python benchmarks/learned_scorer.py --model runs/text-recall-latest --calibration runs/token-scorer-latest \
      --other runs/recall-tiny-latest --other-calibration runs/token-scorer-2

Held-out prompts of the recall task of each model, and plain text where it has it. The policy sees the context alone;
what follows, questions with their answers or more of the text, is fed at once behind what is kept. A few minutes. It
writes benchmarks/results/learned_scorer.json and a section of docs/results.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from results_page import ROOT, commit, origin, put_section

from pikv_core.cache import PiKVCache
from pikv_core.data import tokens
from pikv_core.data.recall import RecallSource
from pikv_core.evaluation.recall import half_interval
from pikv_core.model.loading import load_model
from pikv_core.model.steps import prefill
from pikv_core.recipes import load
from pikv_core.runs import versions
from pikv_core.training.router_lessons import log_probs

HEADING = "## A learned scorer"
RESULTS = ROOT / "benchmarks/results/learned_scorer.json"
METHODS = ("full", "random", "snapkv", "expected-attention", "keydiff", "learned-scorer", "kvzip", "oracle")
CHEAP = METHODS[1:5]  # scorers that ask for no other pass, and learnt nothing
BUDGETS = (0.5, 0.25, 0.12)
LENGTH, AT_A_TIME, SEED = 1024, 8, 7
NUM_TEXT_LATER = 96


def draw(source: RecallSource, num: int) -> list[tuple[torch.Tensor, int, torch.Tensor]]:
    """Return batches of ids [B,T], the length of their contexts, and where answers are to come [B,T]; then text."""
    rng = np.random.default_rng(SEED)
    batches = []
    for _ in range(0, num, AT_A_TIME):
        batch = source.batch(rng, AT_A_TIME, LENGTH, "test")
        batches.append((torch.from_numpy(batch.ids), batch.context_length, torch.from_numpy(batch.answer_mask)))
    if source.streams:
        for _ in range(0, num, AT_A_TIME):
            ids = torch.from_numpy(tokens.windows(rng, tokens.of_split(source.streams, "test"), AT_A_TIME, LENGTH))
            batches.append((ids, LENGTH - NUM_TEXT_LATER, torch.zeros_like(ids, dtype=torch.bool)))
    return batches


@torch.no_grad()
def measure(folder: str, calibration: str, num: int, threads: int) -> list[dict[str, Any]]:
    """Return a row for each method and budget."""
    loaded = load_model(folder, load("generate", None, [], {"model": folder, "threads": threads}))
    assert loaded.folder is not None
    batches = draw(RecallSource.load(loaded.folder), num)
    whole: list[torch.Tensor] = []
    rows = []
    for method in METHODS:
        for budget in BUDGETS if method != "full" else (1.0,):
            recipe: dict[str, Any] = {"policy": method, "budget": budget}
            if method == "learned-scorer":
                recipe["calibration"] = [calibration]
            right, kl, shares = [], {"needles": [], "text": []}, []
            for at, (ids, length, is_answer) in enumerate(batches):
                context, later = ids[:, :length], ids[:, length:]
                cache: PiKVCache = loaded.new_cache(recipe)
                prefill(loaded.model, cache, context, future=later)
                shares.append(cache.resident_bytes / cache.full_bytes)
                probs = log_probs(loaded.model, cache, later)
                if method == "full":
                    whole.append(probs)
                asked = is_answer[:, length:-1]
                kind = "needles" if bool(asked.any()) else "text"
                kl[kind].append(float((whole[at].exp() * (whole[at] - probs)).sum(-1).mean()))
                right.append((probs[:, :-1].argmax(-1) == later[:, 1:])[asked])
            hits = torch.cat(right).float()
            means = {f"kl_{kind}": sum(x) / len(x) for kind, x in kl.items() if x}
            about = {"method": method, "budget": budget, "share": sum(shares) / len(shares)}
            rows.append({**about, "recall": float(hits.mean()), "num_queries": len(hits), **means})
            print(f"{folder}: {rows[-1]}", file=sys.stderr, flush=True)
    return rows


def main() -> None:
    """Measure, then write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="trained by recipes/train/text-recall.yaml")
    parser.add_argument("--calibration", required=True, help="of recipes/train/token-scorer.yaml")
    parser.add_argument("--other", required=True, help="trained by recipes/train/recall-tiny.yaml")
    parser.add_argument("--other-calibration", required=True, help="of the same recipe, fitted to that model")
    parser.add_argument("--num-prompts", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    models = {
        "text-recall": (asked.model, asked.calibration),
        "recall-tiny": (asked.other, asked.other_calibration),
    }
    rows = {
        name: measure(folder, calibration, asked.num_prompts, asked.threads)
        for name, (folder, calibration) in models.items()
    }
    stored = {**origin({"versions": versions()}, commit()), "rows": rows}
    Path(RESULTS).write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
    put_section(HEADING, section(stored))


def section(found: dict[str, Any]) -> list[str]:
    """Return the section of docs/results.md from the stored results."""
    lines = [
        HEADING,
        "",
        "Policies that see a context of about 1,024 tokens alone; what follows is fed at once behind what they keep. "
        "Recall with its 95 % interval, and KL (nats) from the full cache over all that follows. *Way*: how far "
        "`learned-scorer` goes from the best recall of `random`, `snapkv`, `expected-attention` and `keydiff` to that "
        f"of `kvzip`. Made by `benchmarks/learned_scorer.py` on {found['machine']}, commit {found['commit']}.",
    ]
    for name, rows in found["rows"].items():
        kinds = [kind for kind in ("needles", "text") if f"kl_{kind}" in rows[0]]
        lines += ["", f"A model of `recipes/train/{name}.yaml`, {rows[0]['num_queries']} questions:", ""]
        lines += [f"| method | budget | bytes / full | recall | {' | '.join(f'KL, {kind}' for kind in kinds)} |"]
        lines += ["|---|---|---|---|" + "---|" * len(kinds)]
        for row in rows:
            interval = half_interval(row["recall"], row["num_queries"])
            cells = " | ".join(f"{row[f'kl_{kind}']:.4f}" for kind in kinds)
            lines.append(
                f"| {row['method']} | {row['budget']} | {row['share']:.3f} "
                f"| {row['recall']:.3f} ± {interval:.3f} | {cells} |"
            )
        lines += ["", "Way by budget: " + "; ".join(_way(rows, budget) for budget in BUDGETS) + "."]
    return [*lines, ""]


def _way(rows: list[dict[str, Any]], budget: float) -> str:
    """Tell how far the learned scorer goes from the best of CHEAP to kvzip."""
    recall = {row["method"]: row["recall"] for row in rows if row["budget"] == budget}
    best = max(CHEAP, key=lambda method: recall[method])
    ahead = recall["kvzip"] - recall[best]
    if ahead <= 0:
        return f"at {budget} {best} ({recall[best]:.3f}) is not behind kvzip ({recall['kvzip']:.3f})"
    return f"at {budget} {(recall['learned-scorer'] - recall[best]) / ahead:.2f} of that from {best}"


if __name__ == "__main__":
    main()
