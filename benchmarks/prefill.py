"""What each cache method adds to a prompt on a CPU.

    python benchmarks/prefill.py [--tokens 4096] [--kv-heads 2] [--rounds 5] [--threads 1] [--json FILE]

A random llama of 4 layers, hidden 256, 8 heads of 32 in float32 reads one prompt through each cache: against
transformers' DynamicCache under SDPA, and against our own cache that keeps everything. The step's end, when tokens are
dropped and encoded, is also timed by itself, and so is a second prompt of a quarter of the tokens over what is left.
All methods in turn in every round; medians and quartiles of ratios to the peer of the same round, in processor time on
one thread, else in wall time.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from timing import Clock, begin, options, table, tell
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from pikv_core.cache import PiKVCache, calibration
from pikv_core.cache.layer import CacheLayer

STOCK, FULL = "transformers' DynamicCache", "full"
BUDGET = 0.2
EVICTORS = ("streaming-llm", "knorm", "keydiff", "snapkv", "tova", "expected-attention", "h2o")
STREAMED = 64 + 256  # DuoAttention's sinks and newest tokens


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--methods", nargs="+", help="some methods alone, as the table names them")
    arguments = parser.parse_args()
    clock, found = begin(arguments)
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
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        recipes = {
            name: recipe
            for name, recipe in methods(model, folder, arguments.tokens).items()
            if name == FULL or not arguments.methods or name in arguments.methods
        }
        found["num_tokens"], found["num_kv_heads"] = arguments.tokens, arguments.kv_heads
        found["methods"] = rows(model, ids, recipes, arguments.rounds, clock)
    tell(found, tables(found), arguments.json)


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


def rows(model: Any, ids: torch.Tensor, recipes: dict[str, Any], rounds: int, clock: Clock) -> list[dict[str, Any]]:
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


def prefill(model: Any, ids: torch.Tensor, recipe: Any, clock: Clock) -> tuple[float, float, float, tuple[int, int]]:
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


def timed(layer: CacheLayer, clock: Clock, spent: list[float]) -> Callable[[], None]:
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


def tables(found: dict[str, Any]) -> dict[str, str]:
    """Return the Markdown tables by name."""
    head = (
        "| cache | ms | over transformers' | over full | of it dropping and encoding, ms | held | at most | "
        "second prompt over transformers' |"
    )
    rows = [
        f"| {row['method']} | {row['ms']:.0f} | {_percent(row['over_stock'])} | {_percent(row['over_full'])} | "
        f"{row['end_ms']:.1f} | {_mib(row['resident_bytes'])} | {_mib(row['peak_bytes'])} | "
        f"{_percent(row['second_over_stock'])} |"
        for row in found["methods"]
    ]
    return {"prompt": table(head, rows)}


def _percent(quartiles: list[float]) -> str:
    first, median, third = (f"{100 * x:+.1f}" for x in quartiles)
    return f"{median} % ({first} to {third})"


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.2f} MiB"


if __name__ == "__main__":
    main()
