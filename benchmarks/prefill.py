"""What each cache method adds to a prompt on a CPU.

    python benchmarks/prefill.py [--tokens 4096] [--rounds 7] [--threads 1] [--kv-heads 2] [--out benchmarks/results]

A random llama of 4 layers, hidden 256, 8 heads of 32 in float32 reads one prompt through each cache: against
transformers' DynamicCache under SDPA, and against our own cache that keeps everything. The step's end, when tokens are
dropped and encoded, is also timed by itself, and so is a second prompt of a quarter of the tokens over what is left.
All methods in turn in every round; medians and quartiles of ratios to the peer of the same round, in processor time on
one thread, else in wall time. Writes prefill.json and prefill.md.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peers.report import commit, machine
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from pikv_core.cache import PiKVCache, calibration
from pikv_core.cache.layer import CacheLayer
from pikv_core.files import write_json
from pikv_core.runs import versions

STOCK, FULL = "transformers' DynamicCache", "full"
BUDGET = 0.2
EVICTORS = ("streaming-llm", "knorm", "keydiff", "snapkv", "tova", "expected-attention", "h2o")
STREAMED = 64 + 256  # DuoAttention's sinks and newest tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--methods", nargs="+", help="some methods alone, as the table names them")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=arguments.kv_heads,
        head_dim=32,
        intermediate_size=512,
        max_position_embeddings=2 * arguments.tokens,
    )
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(0, config.vocab_size, (1, arguments.tokens))
    clock = time.process_time if arguments.threads == 1 else time.perf_counter
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        recipes = {
            name: recipe
            for name, recipe in methods(model, folder, arguments.tokens).items()
            if name == FULL or not arguments.methods or name in arguments.methods
        }
        found = {
            "machine": machine(),
            "commit": commit(),
            "versions": versions(),
            "threads": arguments.threads,
            "clock": "processor time" if arguments.threads == 1 else "wall time",
            "rounds": arguments.rounds,
            "num_tokens": arguments.tokens,
            "num_kv_heads": arguments.kv_heads,
            "methods": rows(model, ids, recipes, arguments.rounds, clock),
        }
    page = markdown(found)
    write_json(arguments.out / "prefill.json", found)
    (arguments.out / "prefill.md").write_text(page, encoding="utf-8")
    print(page)


def methods(model: Any, folder: str, num_tokens: int) -> dict[str, dict[str, Any]]:
    """Return every method's recipe; `folder` takes random gates for the one that needs some."""
    shape = model.config.num_hidden_layers, model.config.num_key_value_heads
    gates = calibration.Member("duo-attention", "policy", {}, {"gates": torch.rand(shape)})
    corpus = calibration.Corpus(source="random gates", sha256="0" * 64, num_tokens=0)
    calibration.save(folder, "random", model, corpus, [gates])
    duo = {"calibration": [folder], "budget": (num_tokens + STREAMED) // 2}
    return {
        FULL: {},
        "quest": {"policy": {"name": "quest", "dense_layers": 0}, "budget": BUDGET},
        **{name: {"policy": name, "budget": BUDGET} for name in EVICTORS},
        "duo-attention": {"policy": "duo-attention", **duo},
        "duo-attention, streaming prompt": {"policy": {"name": "duo-attention", "streaming_prefill": True}, **duo},
        "int8": {"codec": "int8"},
        "int4": {"codec": "int4"},
        "snapkv+int8": {"policy": "snapkv", "budget": BUDGET, "codec": "int8"},
    }


def rows(
    model: Any, ids: torch.Tensor, recipes: dict[str, Any], rounds: int, clock: Callable[[], float]
) -> list[dict[str, Any]]:
    """Measure a prompt through each cache, after a warm round."""
    names = (STOCK, *recipes)
    times: dict[str, list[float]] = {name: [] for name in names}
    ends: dict[str, list[float]] = {name: [] for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    held: dict[str, tuple[int, int]] = {}
    for counts in [False] + [True] * rounds:
        for name in names:
            ms, end_ms, second_ms, held[name] = prefill(model, ids, recipes.get(name), clock)
            if counts:
                times[name].append(ms)
                ends[name].append(end_ms)
                seconds[name].append(second_ms)
    return [
        {
            "method": name,
            "ms": statistics.median(times[name]),
            "end_ms": statistics.median(ends[name]),
            "over_stock": spread(times[name], times[STOCK]),
            "over_full": spread(times[name], times[FULL]),
            "second_ms": statistics.median(seconds[name]),
            "second_over_stock": spread(seconds[name], seconds[STOCK]),
            "resident_bytes": held[name][0],
            "peak_bytes": held[name][1],
        }
        for name in names
    ]


def prefill(
    model: Any, ids: torch.Tensor, recipe: Any, clock: Callable[[], float]
) -> tuple[float, float, float, tuple[int, int]]:
    """Return the milliseconds of the prompt, its step's ends and a second one, and the bytes held after it, at most."""
    spent = [0.0]
    if recipe is None:
        model.set_attn_implementation("sdpa")
        cache: Any = DynamicCache(config=model.config)
    else:
        cache = PiKVCache.for_model(model, recipe)
        for layer in cache.own_layers:
            layer.compress = timed(layer, clock, spent)
    start = clock()
    model(ids, past_key_values=cache, logits_to_keep=1)
    end = clock()
    end_s = spent[0]
    if recipe is None:
        held = (sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers),) * 2
    else:
        held = cache.resident_bytes, cache.peak_bytes
    again = clock()
    model(ids[:, : ids.shape[1] // 4], past_key_values=cache, logits_to_keep=1)
    return 1e3 * (end - start), 1e3 * end_s, 1e3 * (clock() - again), held


def timed(layer: CacheLayer, clock: Callable[[], float], spent: list[float]) -> Callable[[], None]:
    """Return the layer's `compress`, which adds the seconds it takes to `spent`."""
    own = layer.compress

    def compress() -> None:
        start = clock()
        own()
        spent[0] += clock() - start

    return compress


def spread(times: list[float], peer: list[float]) -> list[float]:
    """Return the quartiles of what the rounds' times are over the peer's, as a share of it."""
    return statistics.quantiles([mine / other - 1 for mine, other in zip(times, peer)], n=4)


def markdown(found: dict[str, Any]) -> str:
    """Return the page of results."""
    lines = [
        "# A prompt on a CPU",
        "",
        f"Made by `benchmarks/prefill.py` on {found['machine']}, commit {found['commit'][:12]}: "
        f"{found['num_tokens']:,} tokens through a random llama of 4 layers, hidden 256, "
        f"8/{found['num_kv_heads']} heads of 32, float32, {found['threads']} thread(s); medians of {found['clock']} in "
        f"{found['rounds']} rounds of all methods in turn, and medians and quartiles of what each took over its peers "
        f"in the same round. Policies at a budget of {BUDGET:.0%}, DuoAttention with half of the heads streaming, at "
        "random (streaming prompt: in the prompt too). The second prompt has a quarter of the tokens.",
        "",
        "| cache | ms | over transformers' | over full | of it dropping and encoding, ms | held | at most | "
        "second prompt over transformers' |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in found["methods"]:
        lines.append(
            f"| {row['method']} | {row['ms']:.0f} | {_percent(row['over_stock'])} | {_percent(row['over_full'])} | "
            f"{row['end_ms']:.1f} | {_mib(row['resident_bytes'])} | {_mib(row['peak_bytes'])} | "
            f"{_percent(row['second_over_stock'])} |"
        )
    return "\n".join([*lines, ""])


def _percent(quartiles: list[float]) -> str:
    first, median, third = (f"{100 * x:+.1f}" for x in quartiles)
    return f"{median} % ({first} to {third})"


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.2f} MiB"


if __name__ == "__main__":
    main()
