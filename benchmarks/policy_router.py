"""The trained router beside each of its strategies at equal bytes, on prompts that it was not trained on.

  python benchmarks/policy_router.py --model runs/text-recall-latest --calibration runs/policy-router-latest

Needles lie in the first or in the second half of a context of real text, or there are none. What follows a context,
questions with their answers or more of the text, is fed at once behind what each method keeps of it. The oracle takes
in every layer of every prompt the strategy that costs least there, the other layers being whole; random takes any. It
writes benchmarks/results/policy_router.json and a section of docs/results.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from typing import Any, NamedTuple

import numpy as np
import torch
from results_page import ROOT, commit, origin, put_section

from pikv_core.cache import PiKVCache
from pikv_core.data.recall import RecallSource
from pikv_core.model.loading import load_model
from pikv_core.model.steps import feed
from pikv_core.recipes import load
from pikv_core.runs import versions
from pikv_core.scheduling.moe_router import GIVEN, MoERouter, features, new_router
from pikv_core.schema import PolicyRouterSettings
from pikv_core.training.held_tokens import held_tokens
from pikv_core.training.policy_router import Prompts, costs, domains, draw, log_probs, one_hot

SETTINGS = PolicyRouterSettings()  # the lengths and budgets that it is trained with by default
SEEDS = (0, 1, 2)
EVALUATION = 1  # of the prompts drawn by a seed
HEADING = "## A router over strategies"
RESULTS = ROOT / "benchmarks/results/policy_router.json"


class Found(NamedTuple):
    """Bytes over the full cache's, KL from it (nats), share of answers that are right (None without), perplexity."""

    share: float
    kl: float
    recall: float | None
    perplexity: float


def weights_by_method(
    model: Any, recipe: dict[str, Any], held: PiKVCache, prompts: Prompts, seed: int
) -> dict[str, Any]:
    """Return for each method what the layers are given [L,B,E], None where the trained router chooses."""
    policy = held.own_layers[0].policy
    assert isinstance(policy, MoERouter)
    E, (B, _), L = len(policy.strategies), prompts.ids.shape, len(held.own_layers)
    generator = torch.Generator().manual_seed(seed)
    anything = torch.randint(E, (L, B), generator=generator)
    capacity = max(1, int(recipe["budget"] * prompts.num_context))
    torch.manual_seed(seed)
    before = []
    for layer in held.own_layers:
        x = features(held_tokens(layer, capacity))
        before.append(new_router(policy.router, x.shape[-1], E, policy.top_k).eval().route(x, None).experts[:, 0])
    best = costs(model, recipe, prompts)[1].argmin(dim=-1)
    chosen = {"random": anything, "untrained": torch.stack(before), "oracle": best}
    singles = {name: one_hot(at, E, B, "cpu").expand(L, -1, -1) for at, name in enumerate(policy.strategies)}
    one_hots = {name: torch.nn.functional.one_hot(index, E).float() for name, index in chosen.items()}
    return {**singles, "trained": None, **one_hots}


@torch.no_grad()
def measure(model: Any, recipe: dict[str, Any], prompts: Prompts, seed: int) -> dict[str, Found]:
    """Return what each method does to the prompts."""
    context, later = prompts.ids[:, : prompts.num_context], prompts.ids[:, prompts.num_context :]
    is_answer = prompts.is_answer[:, prompts.num_context : -1]
    held = PiKVCache.for_model(model, recipe)
    held.hold()
    feed(model, held, context)
    full = log_probs(model, held.fork(), later)
    found = {}
    for name, weights in {"full": None, **weights_by_method(model, recipe, held, prompts, seed)}.items():
        own = held.fork()
        for index, layer in enumerate(own.own_layers):
            if weights is not None:
                layer.run.own[GIVEN] = weights[index]
        if name != "full":
            own.compress()
        share = own.resident_bytes / own.full_bytes
        probs = log_probs(model, own, later)
        kl = float((full.exp() * (full - probs)).sum(-1).mean())
        right = (probs[:, :-1].argmax(-1) == later[:, 1:])[is_answer]
        nats = -probs[:, :-1].gather(-1, later[:, 1:, None]).mean()
        found[name] = Found(share, kl, float(right.float().mean()) if len(right) else None, float(nats.exp()))
    return found


def closed(kl: dict[str, float], singles: tuple[str, ...]) -> tuple[str, float]:
    """Return the best single strategy, and how much of the way from it to the oracle the trained router goes."""
    best = min(singles, key=lambda name: kl[name])
    return best, (kl[best] - kl["trained"]) / max(1e-9, kl[best] - kl["oracle"])


def table(rows: list[dict[str, Any]], singles: tuple[str, ...]) -> list[str]:
    """Return the lines of a Markdown table: means over seeds, of KL with its spread."""
    lines = [
        "| budget | method | bytes / full | recall, needles early | needles late | perplexity of text "
        "| KL: early, late, text | KL, mean |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for budget in SETTINGS.budgets:
        own = [row for row in rows if row["budget"] == budget]
        means = {}
        for method in dict.fromkeys(row["method"] for row in own):
            mine = [row for row in own if row["method"] == method]

            def mean(key: str, kind: str | None = None, mine: list[dict[str, Any]] = mine) -> float:
                return statistics.fmean(row[key] for row in mine if kind in (None, row["kind"]))

            seeds = sorted({row["seed"] for row in mine})
            by_seed = [statistics.fmean(row["kl"] for row in mine if row["seed"] == seed) for seed in seeds]
            means[method] = statistics.fmean(by_seed)
            spread = statistics.stdev(by_seed) if len(by_seed) > 1 else 0.0
            cells = [f"{mean('recall', kind):.3f}" for kind in ("needles early", "needles late")] + [
                f"{mean('perplexity', 'text'):.2f}"
            ]
            cells.append(" ".join(f"{mean('kl', kind):.4f}" for kind in ("needles early", "needles late", "text")))
            lines.append(
                f"| {budget} | {method} | {mean('share'):.3f} | {' | '.join(cells)} "
                f"| {means[method]:.4f} ± {spread:.4f} |"
            )
        best, share = closed(means, singles)
        lines.append(
            f"| {budget} | | | | | | | best single: {best}; share of its gap to the oracle closed: {share:.2f} |"
        )
    return lines


def main() -> None:
    """Measure, then write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="trained by recipes/train/text-recall.yaml")
    parser.add_argument("--calibration", required=True, help="of recipes/train/policy-router.yaml")
    parser.add_argument("--num-prompts", type=int, default=4, help="of each kind and seed")
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    loaded = load_model(asked.model, load("generate", None, [], {"model": asked.model, "threads": asked.threads}))
    assert loaded.folder is not None
    source = RecallSource.load(loaded.folder)
    recipe: dict[str, Any] = {"policy": "moe-router", "calibration": [asked.calibration]}
    rows: list[dict[str, Any]] = []
    for seed in SEEDS:
        for number, kind in enumerate(domains(source)):
            rng = np.random.default_rng([seed, EVALUATION, number])
            prompts = draw(source, kind, rng, asked.num_prompts, SETTINGS, "test")
            for budget in SETTINGS.budgets:
                found = measure(loaded.model, {**recipe, "budget": budget}, prompts, seed)
                about = {"seed": seed, "kind": kind, "budget": budget}
                rows += [{**about, "method": method, **one._asdict()} for method, one in found.items()]
            print(f"seed {seed}, {kind}: done", file=sys.stderr, flush=True)
    policy = PiKVCache.for_model(loaded.model, {**recipe, "budget": SETTINGS.budgets[0]}).own_layers[0].policy
    assert isinstance(policy, MoERouter)
    stored = {
        **origin({"versions": versions()}, commit()),
        "num_prompts": asked.num_prompts,
        "strategies": list(policy.strategies),
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
    put_section(HEADING, section(stored))


def section(found: dict[str, Any]) -> list[str]:
    """Return the section of docs/results.md from the stored results."""
    return [
        HEADING,
        "",
        f"`moe-router`, trained by `recipes/train/policy-router.yaml` on a model of `recipes/train/text-recall.yaml`, "
        "beside each of its strategies in all layers, at equal budgets: held-out contexts of about "
        f"{SETTINGS.length} tokens of real text with needles in the first half or in the second, or with none, "
        f"{found['num_prompts']} of each for each of the seeds {', '.join(map(str, SEEDS))}. What follows a context is "
        "fed at once. KL (nats) is from the full cache, over all that follows, mean over the three kinds, with the "
        "standard deviation over seeds. The oracle takes in every layer of every prompt what costs least with the "
        "other layers whole; random takes any strategy. Made by "
        f"`benchmarks/policy_router.py` on {found['machine']}, commit {found['commit']}.",
        "",
        *table(found["rows"], tuple(found["strategies"])),
        "",
    ]


if __name__ == "__main__":
    main()
