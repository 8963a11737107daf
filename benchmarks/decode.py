"""What one decoded token costs on a CPU: a whole model through each cache.

    python benchmarks/decode.py [--tokens 32768] [--short 512] [--rounds 5] [--threads 1] [--json FILE]

A random llama of 4 layers, hidden 1024, 32/8 heads of 128 in float32, its cache filled with the keys and values of many
random tokens, and of few, low rank by random bases of half the channels; against transformers' DynamicCache under SDPA,
and our own full cache by folded SDPA. All methods in turn in every round; medians, in processor time on one thread,
else in wall time.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from timing import (
    HEAD_DIM,
    KV_HEADS,
    RANK,
    Clock,
    begin,
    between,
    in_turn,
    options,
    quartiles,
    random_fit,
    random_llama,
    table,
    tell,
)
from transformers import DynamicCache

from pikv_core.cache import PiKVCache, calibration
from pikv_core.compression.low_rank_fit import joined
from pikv_kernels.backends import backend_report, forced

STOCK, FULL_TORCH = "transformers' DynamicCache", "full, by folded SDPA"
METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "int8": {"codec": "int8"},
    "int4": {"codec": "int4"},
    "int2": {"codec": "int2"},
    "fp8": {"codec": "fp8"},
    "h2o at 20 %": {"policy": "h2o", "budget": 0.2},
    "snapkv at 20 %": {"policy": "snapkv", "budget": 0.2},
    "snapkv at 20 % + int8": {"policy": "snapkv", "budget": 0.2, "codec": "int8"},
    "quest of 2,048": {"policy": {"name": "quest", "dense_layers": 0}, "budget": 2048},
}
LOW_RANK = {f"low rank of {RANK}": False, f"low rank of {RANK}, rotated when read": True}
STATISTICS = {"h2o": "mass", "snapkv": "votes"}  # what attention to the prompt would have left behind


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--short", type=int, default=512, help="tokens of the second table")
    arguments = parser.parse_args()
    clock, found = begin(arguments)
    with torch.inference_mode():
        found["num_tokens"], found["num_short_tokens"] = arguments.tokens, arguments.short
        found["long"] = model_rows(arguments.tokens, arguments.rounds, clock)
        found["short"] = model_rows(arguments.short, 4 * arguments.rounds, clock)
    found["backends"] = [choice._asdict() for choice in backend_report()]
    tell(found, tables(found), arguments.json)


def save_low_rank(model: Any, unrotated: bool, folder: Path) -> None:
    """Write random bases for every layer, as if they had been fitted."""
    fitted = joined([random_fit(unrotated) for _ in range(model.config.num_hidden_layers)])
    corpus = calibration.Corpus(source="random", sha256="0" * 64, num_tokens=0)
    calibration.save(folder, "random", model, corpus, [calibration.Member("svd", "codec", {}, fitted.tensors)])


def model_rows(num_tokens: int, rounds: int, clock: Clock) -> list[dict[str, Any]]:
    """Measure a decoded token through each cache."""
    model = random_llama(4, num_tokens)
    caches: dict[str, Any] = {name: PiKVCache.for_model(model, recipe) for name, recipe in METHODS.items()}
    with tempfile.TemporaryDirectory() as folder:
        for name, unrotated in LOW_RANK.items():
            fitted = Path(folder) / name
            save_low_rank(model, unrotated, fitted)
            caches[name] = PiKVCache.for_model(model, {"codec": "svd", "calibration": [str(fitted)]})
    stock = DynamicCache(config=model.config)
    for layer in range(model.config.num_hidden_layers):
        keys, values = torch.randn(2, 1, KV_HEADS, num_tokens, HEAD_DIM).unbind(0)
        stock.update(keys, values, layer)
        importance = torch.rand(1, num_tokens)
        for cache in caches.values():
            statistic = STATISTICS.get(cache.recipe.policy.name)
            cache.own_layers[layer].append(keys, values, {statistic: importance} if statistic else None)
    runs = {STOCK: lambda: step(model, stock, "sdpa"), FULL_TORCH: lambda: forced_step(model, caches["full"])}
    runs |= {name: lambda cache=cache: step(model, cache, "pikv") for name, cache in caches.items()}
    held = {STOCK: sum(layer.keys.nbytes + layer.values.nbytes for layer in stock.layers)}
    held |= {name: cache.resident_bytes for name, cache in caches.items()}
    held[FULL_TORCH] = held["full"]
    times = in_turn(runs, rounds, 2, clock)
    medians = {name: statistics.median(seen) for name, seen in times.items()}
    return [
        {
            "method": name,
            **quartiles(seen),
            "times_stock": medians[STOCK] / medians[name],
            "times_full_torch": medians[FULL_TORCH] / medians[name],
            "resident_bytes": held[name],
        }
        for name, seen in times.items()
    ]


def step(model: Any, cache: Any, attention: str) -> None:
    """Decode one token."""
    if model.config._attn_implementation != attention:
        model.set_attn_implementation(attention)
    model(torch.zeros(1, 1, dtype=torch.long), past_key_values=cache, logits_to_keep=1)


def forced_step(model: Any, cache: PiKVCache) -> None:
    """Decode one token without our kernels."""
    with forced("torch"):
        step(model, cache, "pikv")


def tables(found: dict[str, Any]) -> dict[str, str]:
    """Return the Markdown tables by name."""
    head = "| cache | ms a token | quartiles | × transformers' | × full by SDPA | resident |"
    made = {
        name: table(
            head,
            [
                f"| {row['method']} | {row['ms']:.1f} | {between(row)} | {row['times_stock']:.2f} | "
                f"{row['times_full_torch']:.1f} | {row['resident_bytes'] / 2**20:.0f} MiB |"
                for row in found[name]
            ],
        )
        for name in ("long", "short")
    }
    short = {row["method"]: row for row in found["short"]}
    rows = [
        f"| {row['method']} | {row['resident_bytes'] / 2**20:,.0f} MiB | {row['ms']:.0f} | {row['times_stock']:.1f} | "
        f"{row['times_full_torch']:.1f} | {short[row['method']]['times_stock']:.2f} |"
        for row in found["long"]
    ]
    many, few = (f"{found[name]:,}" for name in ("num_tokens", "num_short_tokens"))
    head = f"| {many} tokens | resident | ms each | × transformers' | × full by SDPA | {few} tokens: × transformers' |"
    return {"summary": table(head, rows), **made}


if __name__ == "__main__":
    main()
