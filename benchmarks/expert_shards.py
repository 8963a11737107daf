"""Expert shards beside quest, snapkv and the full cache: recall, bytes read and held, time, and slow shards.

    python benchmarks/expert_shards.py --text runs/text-recall-latest --experts runs/recall-tiny-latest --fitted FITTED

Models are of recipes/train/text-recall.yaml and recall-tiny.yaml, FITTED is a calibration of svd for the first. What is
read is counted while the recall questions are asked; quest gets the budget under which it reads as much. About ten CPU
minutes; it writes benchmarks/results/expert_shards.json, where rows that are there are not measured again, and a
section of docs/results.md.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch
from peers.report import machine
from results_page import ROOT, commit, put_section
from timing import between, in_turn, quartiles, random_llama

from pikv_core import recipes
from pikv_core.cache import PiKVCache
from pikv_core.evaluation.recall import measure_recall
from pikv_core.evaluation.workload import Workload
from pikv_core.model.loading import LoadedModel, load_model
from pikv_core.model.steps import prefill, step
from pikv_core.observation import Reads
from pikv_core.runs import Reporter, versions

HEADING = "## Expert shards"
RESULTS = ROOT / "benchmarks/results/expert_shards.json"
CONTEXT_TOKENS = 1024
PROBE_QUERIES, PROBE_BUDGETS = 128, (128, 512)  # what a budget's reads are told by
LONG_TOKENS = 32768
WEIGHTS = (0.0, 0.5, 1.0, 2.0, 4.0)
TWO, FOUR = "expert-shards, 2 of 8", "expert-shards, 4 of 32"
SHARDS: dict[str, dict[str, Any]] = {
    "expert-shards, 8 of 8": {"shards": 8, "top_shards": 8},
    TWO: {"shards": 8, "top_shards": 2},
    f"{TWO}, by centroids": {"shards": 8, "top_shards": 2, "promise": "centroid"},
    FOUR: {"shards": 32, "top_shards": 4},
}
ROUTED: dict[str, dict[str, Any]] = {
    TWO: SHARDS[TWO],
    f"{TWO}, the router's": {"shards": 8, "top_shards": 2, "by": "router"},
}
QUEST = {"name": "quest", "dense_layers": 0}


class Bench:
    """A model and its questions; rows are written down as they are found."""

    def __init__(self, name: str, model: str, num_queries: int):
        self.name, self.num_queries = name, num_queries
        self.loaded, self._work = _work(model, num_queries)
        self._probe = _work(model, PROBE_QUERIES)[1]
        self.full = self.row("full", {})

    def row(self, method: str, cache: dict[str, Any]) -> dict[str, Any]:
        """Return what a cache recalls, reads and holds, all of it while the questions are asked."""
        known = stored()["rows"]
        for row in known:
            if (row["model"], row["method"], row["num_queries"]) == (self.name, method, self.num_queries):
                return row
        found = self._measure(cache, self._work)
        full = found if method == "full" else self.full
        shares = {f"{what}_share": found[f"{what}_bytes"] / full[f"{what}_bytes"] for what in ("read", "held")}
        told = {key: value for key, value in cache.items() if key != "calibration"}  # a folder of this machine's
        row = {"model": self.name, "method": method, "cache": told, "num_queries": self.num_queries, **found, **shares}
        store({"rows": [*known, row]})
        print(f"{self.name}: {method}: recall {row['recall']:.4f}, {shares}", flush=True)
        return row

    def reading(self, policy: dict[str, Any], share: float) -> dict[str, Any]:
        """Return a recipe of a policy with the budget under which it reads this share of the full cache's bytes."""
        whole = self._measure({}, self._probe)["read_bytes"]
        caches = ({"policy": policy, "budget": budget} for budget in PROBE_BUDGETS)
        low, high = (self._measure(cache, self._probe)["read_bytes"] / whole for cache in caches)
        first, last = PROBE_BUDGETS
        return {"policy": policy, "budget": round(first + (share - low) / (high - low) * (last - first))}

    def _measure(self, cache: dict[str, Any], work: Workload) -> dict[str, Any]:
        read = slow = held = 0
        last: list[tuple[PiKVCache, Reads]] = []

        def count_last() -> None:
            nonlocal read, slow, held
            while last:
                used, reads = last.pop()
                read, slow, held = read + reads.num_bytes, slow + reads.slow_bytes, held + used.resident_bytes

        def new_cache() -> PiKVCache:
            count_last()
            made = PiKVCache.for_model(self.loaded.model, cache)
            last.append((made, made.count_reads()))
            return made

        assert work.prompts is not None
        found = measure_recall(self.loaded.model, new_cache, work.prompts, "after", work.batch_size)
        count_last()
        told = {"recall": found.share, "interval": found.interval, "read_bytes": read, "held_bytes": held}
        return {**told, "slow_read_share": slow / read}


def stored() -> dict[str, Any]:
    """Return what has been found so far."""
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {"rows": [], "times": []}


def store(found: dict[str, Any]) -> None:
    """Write down what has been found beside what was."""
    RESULTS.write_text(json.dumps({**stored(), **found}, indent=1) + "\n", encoding="utf-8")


def _work(model: str, num_queries: int) -> tuple[LoadedModel, Workload]:
    asked = {"model": model, "tasks": ["recall"], "num_queries": num_queries, "context_tokens": CONTEXT_TOKENS}
    recipe = recipes.load("compress", None, (), {**asked, "dtype": "float32", "threads": 1})
    loaded = load_model(recipe.model, recipe)
    return loaded, Workload.of(recipe, loaded, Reporter())


def main() -> None:
    """Measure what is missing, and write the results and their section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, help="a model of text-recall.yaml")
    parser.add_argument("--experts", required=True, help="a model of recall-tiny.yaml")
    parser.add_argument("--fitted", required=True, help="a calibration of svd for --text")
    parser.add_argument("--num-queries", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=9, help="of each timing")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    store({"machine": machine(), "commit": commit(), "versions": versions()})
    text = Bench("text", asked.text, asked.num_queries)
    compare(text, SHARDS, [TWO, FOUR])
    policy = {"name": "expert-shards", **SHARDS[TWO]}
    text.row(f"{TWO} + svd", {"policy": policy, "codec": "svd", "calibration": [asked.fitted]})
    compare(Bench("experts", asked.experts, asked.num_queries), ROUTED, [TWO])
    slow = Bench("slow", asked.text, asked.num_queries // 2)
    for weight in WEIGHTS:
        slow.row(f"{weight:g}", {"policy": {**policy, "slow_shards": 4, "latency": 10.0, "latency_weight": weight}})
    store({"times": times(text, asked.rounds)})
    put_section(HEADING, section(stored()))


def compare(bench: Bench, shards: dict[str, dict[str, Any]], as_much: list[str]) -> None:
    """Measure shards, and quest and snapkv that read as much as some of them."""
    rows = {name: bench.row(name, {"policy": {"name": "expert-shards", **own}}) for name, own in shards.items()}
    for name in as_much:
        bench.row(f"quest, reads as {name}", bench.reading(QUEST, rows[name]["read_share"]))
    share = round(rows[TWO]["read_share"], 3)
    bench.row(f"snapkv, reads as {TWO}", {"policy": "snapkv", "budget": share})


def times(text: Bench, rounds: int) -> list[dict[str, Any]]:
    """Return what a decoded token takes of the model behind a prompt, and of a random llama at a long context."""
    as_much = text.row(f"quest, reads as {TWO}", {})
    caches: dict[str, dict[str, Any]] = {
        "full": {},
        "quest": as_much["cache"],
        TWO: {"policy": {"name": "expert-shards", **SHARDS[TWO]}},
    }
    ids = torch.randint(8, 64, (1, CONTEXT_TOKENS), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        short = {name: PiKVCache.for_model(text.loaded.model, cache) for name, cache in caches.items()}
        for cache in short.values():
            prefill(text.loaded.model, cache, ids)
        found = timed(text.loaded.model, short, rounds, CONTEXT_TOKENS)
        model = random_llama(2, LONG_TOKENS)
        full, shards = (filled(model, caches[name]) for name in ("full", TWO))
        whole = read_bytes(model, full)
        bounds = whole / 16  # of quest's pages of 16 tokens: two vectors for each
        caches["quest"] = {"policy": QUEST, "budget": int((read_bytes(model, shards) - bounds) / whole * LONG_TOKENS)}
        long = {"full": full, "quest": filled(model, caches["quest"]), TWO: shards}
        return found + timed(model, long, rounds, LONG_TOKENS)


def filled(model: Any, cache: dict[str, Any]) -> PiKVCache:
    """Return a cache of drawn keys and values, the same for all caches."""
    made, generator = PiKVCache.for_model(model, cache), torch.Generator().manual_seed(0)
    shape = (2, 1, model.config.num_key_value_heads, LONG_TOKENS, model.config.head_dim)
    for layer in made.own_layers:
        layer.append(*torch.randn(shape, generator=generator))
    return made


def read_bytes(model: Any, cache: PiKVCache) -> int:
    """Return what one more token reads."""
    reads = cache.count_reads()
    step(model, cache, torch.zeros(1, dtype=torch.long))
    return reads.num_bytes


def timed(model: Any, caches: dict[str, PiKVCache], rounds: int, num_tokens: int) -> list[dict[str, Any]]:
    """Decode a token through each cache in turn, by processor time."""
    token = torch.zeros(1, dtype=torch.long)
    runs = {name: lambda cache=cache: step(model, cache, token) for name, cache in caches.items()}
    found = in_turn(runs, rounds, 4, time.process_time)
    reads = {name: read_bytes(model, cache) for name, cache in caches.items()}
    return [
        {"num_tokens": num_tokens, "method": name, "read_bytes": reads[name], **quartiles(seen)}
        for name, seen in found.items()
    ]


def section(found: dict[str, Any]) -> list[str]:
    """Return the section of docs/results.md from the stored results."""
    rows: dict[str, dict[str, Any]] = {}
    for row in found["rows"]:
        rows.setdefault(row["model"], {})[row["method"]] = row
    head = ["| | budget | bytes read | bytes held | recall |", "|---|---|---|---|---|"]

    def told(model: str) -> list[str]:
        return [
            f"| {name} | {row['cache'].get('budget', '')} | {row['read_share']:.3f} | {row['held_share']:.3f} | "
            f"{row['recall']:.4f} ± {row['interval']:.4f} |"
            for name, row in rows[model].items()
        ]

    slow = rows["slow"]
    num_queries, num_slow = (next(iter(rows[model].values()))["num_queries"] for model in ("text", "slow"))
    return [
        HEADING,
        "",
        f"Recall of {num_queries:,} questions, asked after the context of {CONTEXT_TOKENS:,} tokens was read; bytes "
        "read while they were asked, selectors' bounds and centroids included, and bytes held, as shares of the full "
        "cache's in the same run; float32, every layer selects. All shards are the full attention. quest has the "
        "budget in tokens under which it reads as much as the shards it is named after. Made by "
        f"`benchmarks/expert_shards.py` on {found['machine']}, commit {found['commit']}.",
        "",
        "The model of `recipes/train/text-recall.yaml`, needles in real text:",
        "",
        *head,
        *told("text"),
        "",
        "The mixture of 8 experts of `recipes/train/recall-tiny.yaml`, where tokens can go by the layer's own router:",
        "",
        *head,
        *told("experts"),
        "",
        f"Four of eight shards ten times as slow as the others, two read ({num_slow:,} questions; the full cache "
        f"{slow['full']['recall']:.4f}):",
        "",
        "| latency_weight | share of the bytes read from slow shards | recall | loss to weight 0 |",
        "|---|---|---|---|",
        *(
            f"| {weight:g} | {row['slow_read_share']:.3f} | {row['recall']:.4f} ± {row['interval']:.4f} | "
            f"{slow['0']['recall'] - row['recall']:.4f} |"
            for weight in WEIGHTS
            for row in [slow[f"{weight:g}"]]
        ),
        "",
        "Time of a decoded token, processor time on one thread, all in turn; at the long context the llama of "
        "`benchmarks/decode.py` with 2 layers and drawn keys:",
        "",
        "| tokens | method | MiB read | ms a token | quartiles |",
        "|---|---|---|---|---|",
        *(
            f"| {row['num_tokens']:,} | {row['method']} | {row['read_bytes'] / 2**20:.2f} | {row['ms']:.2f} | "
            f"{between(row)} |"
            for row in found["times"]
        ),
        "",
    ]


if __name__ == "__main__":
    main()
