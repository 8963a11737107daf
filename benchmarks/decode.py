"""What one decoded token costs on a CPU: attention of one layer, and a whole model through each cache.

    python benchmarks/decode.py [--tokens 32768] [--short 512] [--rounds 5] [--threads 1] [--out benchmarks/results]

Attention: one layer of 32/8 heads of 128 over half and over twice as many random tokens, against torch's SDPA in
float32 with the query group folded into query rows, and as transformers calls it, `enable_gqa`; the bytes that are read
a second over those that a copy of a large buffer reads and writes. Model: a random llama of 4 layers, hidden 1024, 32/8
heads of 128 in float32, its cache filled with the keys and values of many random tokens, and of few, low rank by random
bases of half the channels; against transformers' DynamicCache under SDPA, and our own full cache by folded SDPA.
All methods in turn in every round; medians, in processor time on one thread, else in wall time. Writes decode.json and
decode.md.
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
import torch.nn.functional as F
from peers.report import commit, machine
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from pikv_core.cache import PiKVCache, calibration
from pikv_core.cache.page_bounds import PageBounds
from pikv_core.cache.rotary import Rotary
from pikv_core.compression.base import Codec
from pikv_core.compression.fp8 import Float8
from pikv_core.compression.int2 import Int2
from pikv_core.compression.int4 import Int4
from pikv_core.compression.int8 import Int8
from pikv_core.compression.levels import Levels
from pikv_core.compression.low_rank_fit import LayerFit, joined
from pikv_core.compression.none import Plain
from pikv_core.files import write_json
from pikv_core.runs import versions
from pikv_kernels.attend_tokens import attend_tokens
from pikv_kernels.backends import backend_report, forced
from pikv_kernels.page_scores import page_scores

G, R, D = 8, 4, 128
PAGE_TOKENS, PAGES = 16, 64
RANK = D // 2
COPIED_NUMBERS = 2**26  # of float32: beyond all caches
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--short", type=int, default=512, help="tokens of a second table of the model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    clock = time.process_time if arguments.threads == 1 else time.perf_counter
    with torch.inference_mode():
        found = {
            "machine": machine(),
            "commit": commit(),
            "versions": versions(),
            "threads": arguments.threads,
            "clock": "processor time" if arguments.threads == 1 else "wall time",
            "rounds": arguments.rounds,
            "num_tokens": arguments.tokens,
            "attention": [
                row
                for num_tokens in (arguments.tokens // 2, 2 * arguments.tokens)
                for row in attention_rows(num_tokens, arguments.rounds, clock)
            ],
            "model": model_rows(arguments.tokens, arguments.rounds, clock),
            "num_short_tokens": arguments.short,
            "short": model_rows(arguments.short, 4 * arguments.rounds, clock),
            "backends": [choice._asdict() for choice in backend_report()],
        }
    page = markdown(found)
    write_json(arguments.out / "decode.json", found)
    (arguments.out / "decode.md").write_text(page, encoding="utf-8")
    print(page)


def attention_rows(num_tokens: int, rounds: int, clock: Callable[[], float]) -> list[dict[str, Any]]:
    """Measure one layer's attention by each kernel."""
    query, (keys, values) = torch.randn(1, G, R, D), torch.randn(2, 1, G, num_tokens, D).unbind(0)
    position = torch.arange(num_tokens).expand(1, G, -1)
    scale = D**-0.5
    low, half = (keys.bfloat16(), values.bfloat16()), (keys.half(), values.half())
    bounds = PageBounds(PAGE_TOKENS)
    bounds.append(keys, None)
    plain = Plain()
    runs: dict[str, Callable[[], Any]] = {
        "SDPA, folded": lambda: F.scaled_dot_product_attention(query, keys, values, scale=scale),
        "SDPA, enable_gqa": lambda: F.scaled_dot_product_attention(
            query.view(1, G * R, 1, D), keys, values, scale=scale, enable_gqa=True
        ),
        "float32": lambda: attend_tokens(query, keys, values, None, scale, backend="numba"),
        "bfloat16": lambda: attend_tokens(query, *low, None, scale, backend="numba"),
        "float16": lambda: attend_tokens(query, *half, None, scale, backend="numba"),
    }
    exact = keys.nbytes + values.nbytes
    read = dict.fromkeys(runs, exact) | {"bfloat16": exact // 2, "float16": exact // 2}
    rotary = Rotary.of(random_llama(1, num_tokens))
    codecs: dict[str, Codec] = {codec.name: codec for codec in (Int8(), Int4(), Int2(), Float8(), Levels())}
    codecs |= {name: random_fit(unrotated).codec(0, rotary) for name, unrotated in LOW_RANK.items()}
    for name, codec in codecs.items():
        whole = num_tokens // codec.unit_tokens * codec.unit_tokens
        codes = codec.encode(keys[:, :, :whole], values[:, :, :whole], position[..., :whole])
        runs[name] = lambda codec=codec, codes=codes, at=position[..., :whole]: codec.attend(
            query, codes, at, None, scale, None, False
        )
        read[name] = sum(x.nbytes for x in codes.values())
    stored = {"keys": keys, "values": values}

    def quest() -> Any:
        pages = page_scores(query, bounds.lowest, bounds.highest, "numba").topk(min(PAGES, bounds.num_pages)).indices
        return plain.attend_pages(query, stored, pages, PAGE_TOKENS, None, scale, None)

    picked = f"quest, {PAGES} pages of {PAGE_TOKENS}"
    runs[picked] = quest
    read[picked] = bounds.lowest.nbytes + bounds.highest.nbytes + exact * PAGES * PAGE_TOKENS // num_tokens
    source = torch.ones(COPIED_NUMBERS)
    target = torch.empty_like(source)
    times = in_turn({**runs, "copy": lambda: target.copy_(source)}, rounds, 3, clock)
    medians = {name: statistics.median(seen) for name, seen in times.items()}
    copied = 2 * source.nbytes / medians["copy"]
    return [
        {
            "num_tokens": num_tokens,
            "method": name,
            **spread(times[name]),
            "times_faster": medians["SDPA, folded"] / medians[name],
            "times_unfolded": medians["SDPA, enable_gqa"] / medians[name],
            "bytes_read": read[name],
            "share_of_copy": read[name] / medians[name] / copied,
        }
        for name in runs
    ]


def random_llama(num_layers: int, num_tokens: int) -> Any:
    """Return a llama of hidden 1024 in float32."""
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=1024,
        num_hidden_layers=num_layers,
        num_attention_heads=G * R,
        num_key_value_heads=G,
        head_dim=D,
        intermediate_size=2816,
        max_position_embeddings=2 * num_tokens,
    )
    return LlamaForCausalLM(config).eval()


def random_fit(unrotated: bool) -> LayerFit:
    """Return random bases of half the channels."""
    key, value = torch.linalg.qr(torch.randn(2, G, D, RANK)).Q.unbind(0)
    return LayerFit((key, key), (value, value), unrotated)


def save_low_rank(model: Any, unrotated: bool, folder: Path) -> None:
    """Write random bases for every layer, as if they had been fitted."""
    fitted = joined([random_fit(unrotated) for _ in range(model.config.num_hidden_layers)])
    corpus = calibration.Corpus(source="random", sha256="0" * 64, num_tokens=0)
    calibration.save(folder, "random", model, corpus, [calibration.Member("svd", "codec", {}, fitted.tensors)])


def model_rows(num_tokens: int, rounds: int, clock: Callable[[], float]) -> list[dict[str, Any]]:
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
        keys, values = torch.randn(2, 1, G, num_tokens, D).unbind(0)
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
            **spread(seen),
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


def in_turn(
    runs: dict[str, Callable[[], Any]], rounds: int, repeats: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Return the milliseconds of every run, `repeats` after a warm one in each round."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            run()
            for _ in range(repeats):
                start = clock()
                run()
                times[name].append(1e3 * (clock() - start))
    return times


def spread(times: list[float]) -> dict[str, float]:
    """Return the median and the quartiles, in milliseconds."""
    first, median, third = statistics.quantiles(times, n=4)
    return {"ms": median, "ms_first_quartile": first, "ms_third_quartile": third}


def markdown(found: dict[str, Any]) -> str:
    """Return the page of results."""
    lines = [
        "# One decoded token on a CPU",
        "",
        f"Made by `benchmarks/decode.py` on {found['machine']}, commit {found['commit'][:12]}: {found['num_tokens']:,} "
        f"tokens, {found['threads']} thread(s), medians and quartiles of {found['clock']} in {found['rounds']} rounds "
        "of all methods in turn.",
        "",
        "One layer's attention, 32/8 heads of 128:",
        "",
        "| tokens | over | ms | quartiles | × folded SDPA | × SDPA with enable_gqa | of a copy's bytes/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found["attention"]:
        lines.append(
            f"| {row['num_tokens']:,} | {row['method']} | {row['ms']:.2f} | {_quartiles(row)} | "
            f"{row['times_faster']:.1f} | {row['times_unfolded']:.1f} | {row['share_of_copy']:.0%} |"
        )
    lines += [
        "",
        "A random llama of 4 layers, hidden 1024, 32/8 heads of 128, float32:",
        *_model_table(found["model"]),
        "",
        f"The same over {found['num_short_tokens']:,} tokens, where a step is linear layers and overhead:",
        *_model_table(found["short"]),
    ]
    return "\n".join([*lines, ""])


def _model_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "",
        "| cache | ms a token | quartiles | × transformers' | × full by SDPA | resident |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['method']} | {row['ms']:.1f} | {_quartiles(row)} | {row['times_stock']:.2f} | "
            f"{row['times_full_torch']:.1f} | {row['resident_bytes'] / 2**20:.0f} MiB |"
        )
    return lines


def _quartiles(row: dict[str, Any]) -> str:
    return f"{row['ms_first_quartile']:.2f} to {row['ms_third_quartile']:.2f}"


if __name__ == "__main__":
    main()
