"""The trained router beside each of its strategies at equal bytes, on prompts that it was not trained on.

  python benchmarks/policy_router.py --model runs/text-recall-latest --calibration runs/policy-router-latest

Needles lie in the first or in the second half of a context of real text, or there are none. What follows a context,
questions with their answers or more of the text, is fed at once behind what each method keeps of it. The oracle starts
from a prompt's best single strategy and takes, in one layer after the other, the strategy that then loses least; random
takes any. It writes benchmarks/results/policy_router.json and a section of docs/results.md.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from operator import methodcaller
from typing import Any

import numpy as np
import torch
from results_page import ROOT, commit, origin, put_section

from pikv_core.data.recall import RecallSource
from pikv_core.model.loading import load_model
from pikv_core.recipes import load
from pikv_core.runs import versions
from pikv_core.schema import PolicyRouterSettings
from pikv_core.training.policy_router import choice, untrained
from pikv_core.training.router_lessons import Choose, Held, always, at_random, domains, draw, log_probs

SETTINGS = PolicyRouterSettings()  # the lengths and budgets that it is trained with by default
SEEDS = (0, 1, 2)
EVALUATION = 1  # of the prompts drawn by a seed
KINDS = ("needles early", "needles late", "text")
HEADING = "## A router over strategies"
RESULTS = ROOT / "benchmarks/results/policy_router.json"


def methods(held: Held, model: Any, seed: int) -> dict[str, Choose | None]:
    """Return what chooses the weights for each method, None where the policy does."""
    singles: dict[str, Choose] = {name: always(strategy) for strategy, name in enumerate(held.policy.strategies)}
    start = untrained(model, held.policy, {}, seed, held.features.shape[-1])
    before = choice(held.policy, start)
    return {
        **singles,
        "trained": None,
        "random": at_random(seed),
        "untrained": before,
        "oracle": methodcaller("oracle"),
    }


@torch.no_grad()
def measure(model: Any, held: Held, seed: int) -> dict[str, dict[str, Any]]:
    """Return of each method bytes over the full cache's, and of each prompt its KL from it, recall and nats a token.

    KL in nats; recall is the share of answers that are right, None where there are none.
    """
    later = held.later
    is_answer = held.prompts.is_answer[:, held.prompts.num_context : -1]
    found = {}
    for name, choose in {"full": None, **methods(held, model, seed)}.items():
        cache = held.cache.fork() if name == "full" else held.compressed(None if choose is None else choose(held))
        share = cache.resident_bytes / cache.full_bytes
        probs = log_probs(model, cache, later)
        right = (probs[:, :-1].argmax(-1) == later[:, 1:]).float()
        asked = bool(is_answer.any())
        found[name] = {
            "share": share,
            "kl": rounded((held.full.exp() * (held.full - probs)).sum(-1).mean(-1).tolist()),
            "recall": rounded([float(own[mask].mean()) for own, mask in zip(right, is_answer)]) if asked else None,
            "nats": rounded((-probs[:, :-1].gather(-1, later[:, 1:, None])[..., 0].mean(-1)).tolist()),
        }
    return found


def rounded(figures: list[float]) -> list[float]:
    """Return figures with the digits that are kept."""
    return [round(figure, 6) for figure in figures]


def table(rows: list[dict[str, Any]], singles: tuple[str, ...]) -> list[str]:
    """Return the lines of a Markdown table: means over prompts, of KL with its standard error."""
    lines = [
        "| budget | method | bytes / full | recall, needles early | needles late | perplexity of text "
        "| KL: early, late, text | KL, mean |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for budget in SETTINGS.budgets:
        own = [row for row in rows if row["budget"] == budget]
        kl: dict[str, list[float]] = {}
        for method in dict.fromkeys(row["method"] for row in own):
            mine = [row for row in own if row["method"] == method]
            kl[method] = values(mine, "kl")
            by_kind = {kind: [row for row in mine if row["kind"] == kind] for kind in KINDS}
            cells = [
                f"{statistics.fmean(row['share'] for row in mine):.3f}",
                *(f"{statistics.fmean(values(by_kind[kind], 'recall')):.3f}" for kind in KINDS[:2]),
                f"{math.exp(statistics.fmean(values(by_kind['text'], 'nats'))):.2f}",
                " ".join(f"{statistics.fmean(values(by_kind[kind], 'kl')):.4f}" for kind in KINDS),
                with_error(kl[method]),
            ]
            lines.append(f"| {budget} | {method} | {' | '.join(cells)} |")
        best = min(singles, key=lambda name: statistics.fmean(kl[name]))
        ahead = [one - other for one, other in zip(kl[best], kl["trained"])]
        gap = statistics.fmean(kl[best]) - statistics.fmean(kl["oracle"])
        lines.append(
            f"| {budget} | | | | | | | trained is {with_error(ahead)} better than the best single, {best}, prompt by "
            f"prompt: {statistics.fmean(ahead) / gap:.2f} of the way to the oracle |"
        )
    return lines


def values(rows: list[dict[str, Any]], key: str) -> list[float]:
    """Return a figure of every prompt."""
    return [value for row in rows for value in row[key]]


def with_error(of_prompts: list[float]) -> str:
    """Return the mean and its standard error."""
    error = statistics.stdev(of_prompts) * len(of_prompts) ** -0.5
    return f"{statistics.fmean(of_prompts):.4f} ± {error:.4f}"


def main() -> None:
    """Measure, then write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="trained by recipes/train/text-recall.yaml")
    parser.add_argument(
        "--calibration", required=True, nargs=len(SEEDS), help="of recipes/train/policy-router.yaml, one for each seed"
    )
    parser.add_argument("--num-prompts", type=int, default=8, help="of each kind and seed")
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    loaded = load_model(asked.model, load("generate", None, [], {"model": asked.model, "threads": asked.threads}))
    assert loaded.folder is not None
    source = RecallSource.load(loaded.folder)
    rows: list[dict[str, Any]] = []
    for seed, calibration in zip(SEEDS, asked.calibration):
        recipe = {"policy": "moe-router", "calibration": [calibration]}
        for number, kind in enumerate(domains(source)):
            rng = np.random.default_rng([seed, EVALUATION, number])
            prompts = draw(source, kind, rng, asked.num_prompts, SETTINGS, "test")
            for budget in SETTINGS.budgets:
                held = Held(loaded.model, {**recipe, "budget": budget}, prompts)
                about = {"seed": seed, "kind": kind, "budget": budget}
                rows += [{**about, "method": name, **one} for name, one in measure(loaded.model, held, seed).items()]
            print(f"seed {seed}, {kind}: done", file=sys.stderr, flush=True)
    stored = {
        **origin({"versions": versions()}, commit()),
        "num_prompts": asked.num_prompts,
        "strategies": list(held.policy.strategies),
        "rows": rows,
    }
    RESULTS.write_text(written(stored), encoding="utf-8")
    put_section(HEADING, section(stored))


def written(stored: dict[str, Any]) -> str:
    """Return the results as JSON, a row a line."""
    rows = ",\n  ".join(json.dumps(row) for row in stored["rows"])
    about = json.dumps({**stored, "rows": []}, indent=1)
    return about.replace('"rows": []', f'"rows": [\n  {rows}\n ]') + "\n"


def section(found: dict[str, Any]) -> list[str]:
    """Return the section of docs/results.md from the stored results."""
    return [
        HEADING,
        "",
        "`moe-router`, trained by `recipes/train/policy-router.yaml` on a model of `recipes/train/text-recall.yaml` "
        f"with the seeds {', '.join(map(str, SEEDS))}, beside each of its strategies in all layers, at equal budgets: "
        f"held-out contexts of about {SETTINGS.length} tokens of real text with needles in the first half or in the "
        f"second, or with none, {found['num_prompts']} of each for each seed. What follows a context is fed at once. "
        "KL (nats) is from the full cache, over all that follows; ± is the standard error over prompts. The oracle "
        "starts from a prompt's best single strategy and takes, in one layer after the other, the strategy that then "
        f"loses least; random takes any. Made by `benchmarks/policy_router.py` on {found['machine']}, commit "
        f"{found['commit']}.",
        "",
        *table(found["rows"], tuple(found["strategies"])),
        "",
    ]


if __name__ == "__main__":
    main()
