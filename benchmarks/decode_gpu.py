"""What one decoded token costs on a GPU: whole models through each cache, step by step and replayed as a CUDA graph.

    PYTHONPATH=.:kernels python benchmarks/decode_gpu.py [--tokens 32768] [--batch 4] [--steps 20] [--json FILE]

A random llama of 4 layers of Llama 3.1 8B's sizes in bfloat16, its caches filled with the keys and values of random
tokens; against transformers' DynamicCache under SDPA. Medians of wall time, the device being waited for after each
step. Before that, in float32 and on a small model: greedy tokens of the full cache are those of transformers', replayed
steps give those of steps, and each codec's logits by Triton are those by torch. On a CPU the same runs small, without
graphs. Ends with 1 where anything differs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timing import table
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from pikv_core.cache import PiKVCache
from pikv_core.model.replayed_step import ReplayedStep
from pikv_core.model.steps import step
from pikv_kernels.backends import backend_report, forced

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
STOCK = "transformers' DynamicCache"
STATISTICS = {"h2o": "mass", "snapkv": "votes"}  # what attention to the prompt would have left behind


def methods(num_tokens: int) -> dict[str, dict[str, Any]]:
    """Return the caches that are compared, a fifth of the tokens for what drops."""
    fifth = num_tokens // 5
    return {
        "full": {},
        "int8": {"codec": "int8"},
        "int4": {"codec": "int4"},
        "int2": {"codec": "int2"},
        "fp8": {"codec": "fp8"},
        "streaming-llm at 20 %": {"policy": "streaming-llm", "budget": fifth},
        "h2o at 20 %": {"policy": "h2o", "budget": fifth},
        "snapkv at 20 %": {"policy": "snapkv", "budget": fifth},
        "snapkv at 20 % + int8": {"policy": "snapkv", "budget": fifth, "codec": "int8"},
        "quest of 2,048": {"policy": {"name": "quest", "dense_layers": 0}, "budget": 2048},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32768 if DEVICE.type == "cuda" else 2560)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "num_tokens": arguments.tokens,
        "batch": arguments.batch,
        "checks": [],
        "rows": [],
    }
    with torch.inference_mode():
        for name, check in (("stock", check_stock), ("replay", check_replay), ("codecs", check_codecs)):
            attempt(found, f"check {name}", lambda check=check: found["checks"].extend(check()))
        measure_all(found, arguments)
    found["backends"] = [choice._asdict() for choice in backend_report()]
    print(shown(found), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
    if found.get("errors") or not all(row["right"] for row in found["checks"]):
        raise SystemExit(1)


def attempt(found: dict[str, Any], name: str, work: Callable[[], Any]) -> None:
    """Do a part of the run; tell its error and go on with the next, as a lent machine is not had twice."""
    try:
        work()
    except Exception as error:
        print(f"FAILED {name}: {type(error).__name__}: {str(error)[:600]}", flush=True)
        found.setdefault("errors", []).append({"part": name, "error": str(error)[:600]})


def llama(num_layers: int, width: int, heads: int, num_tokens: int, dtype: torch.dtype) -> Any:
    """Return a random llama of groups of 4 heads of 128 channels."""
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=width,
        num_hidden_layers=num_layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 4,
        head_dim=128,
        intermediate_size=7 * width // 2,
        max_position_embeddings=2 * num_tokens,
        dtype=dtype,
    )
    with DEVICE:
        return LlamaForCausalLM(config).to(dtype).eval()


def told(what: str, right: bool, figure: float) -> dict[str, Any]:
    print(f"  {'ok   ' if right else 'WRONG'} {what:52} {figure:.2e}", flush=True)
    return {"what": what, "right": right, "figure": figure}


def greedy(model: Any, cache: Any, ids: torch.Tensor, num_new: int, feed: Callable[..., Any]) -> torch.Tensor:
    """Return the tokens [B,N] that follow a prompt."""
    logits = model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1].float()
    tokens = [logits.argmax(-1)]
    for _ in range(num_new - 1):
        tokens.append(feed(tokens[-1]).argmax(-1))
    return torch.stack(tokens, dim=1)


def check_stock() -> list[dict[str, Any]]:
    model, ids = llama(2, 512, 8, 512, torch.float32), torch.randint(0, 1024, (2, 300), device=DEVICE)
    model.set_attn_implementation("sdpa")
    stock = DynamicCache(config=model.config)
    expected = greedy(
        model, stock, ids, 48, lambda t: model(t[:, None], past_key_values=stock, logits_to_keep=1).logits[:, -1]
    )
    rows = []
    for name, recipe in {"full": {}, "quest": {"policy": "quest"}, "h2o": {"policy": "h2o"}}.items():
        cache = PiKVCache.for_model(model, recipe)
        got = greedy(model, cache, ids, 48, lambda t, cache=cache: step(model, cache, t))
        same = float((got == expected).float().mean())
        rows.append(told(f"{name} at budget 1.0, greedy tokens that are stock's", same == 1, same))
    return rows


def check_replay() -> list[dict[str, Any]]:
    if DEVICE.type == "cpu":
        return []
    rows, ids = [], torch.randint(0, 1024, (2, 300), device=DEVICE)
    model = llama(2, 512, 8, 512, torch.float32)
    for policy in ("streaming-llm", "h2o", "snapkv", "tova", "lru", "lfu", "knorm", "random"):
        tokens = []
        for replays in (False, True):
            torch.manual_seed(1)
            cache = PiKVCache.for_model(model, {"policy": policy, "budget": 128})
            replayed = ReplayedStep(model, cache)
            feed = replayed if replays else lambda t, cache=cache: step(model, cache, t)
            tokens.append(greedy(model, cache, ids, 64, feed))
        same = float((tokens[0] == tokens[1]).float().mean())
        rows.append(told(f"{policy} at 128, replayed tokens that are those of steps", same == 1, same))
        rows.append(told(f"{policy}, steps that were replayed", replayed.num_replayed > 40, replayed.num_replayed))
    return rows


def check_codecs() -> list[dict[str, Any]]:
    rows, ids = [], torch.randint(0, 1024, (2, 1000), device=DEVICE)
    model = llama(2, 512, 8, 1024, torch.float32)
    for recipe in ({}, *({"codec": codec} for codec in ("int8", "int4", "int2", "fp8"))):
        for policy in ({}, {"policy": {"name": "quest", "dense_layers": 0}, "budget": 256}):
            cache = PiKVCache.for_model(model, recipe | policy)
            model(ids, past_key_values=cache, logits_to_keep=1)
            other = cache.fork()
            token = ids[:, -1]
            with forced("torch"):
                expected = step(model, other, token)
            got = step(model, cache, token)
            error = float((got - expected).norm() / expected.norm())
            name = "+".join([str(policy.get("policy", {"name": "full"})["name"]), str(recipe.get("codec", "none"))])
            rows.append(told(f"{name}, logits by our kernels against torch", error < 5e-3, error))
    return rows


def filled(model: Any, recipe: dict[str, Any] | None, batch: int, num_tokens: int) -> Any:
    """Return a cache that holds random tokens; of transformers' own for None."""
    config = model.config
    cache = DynamicCache(config=config) if recipe is None else PiKVCache.for_model(model, recipe)
    generator = torch.Generator(DEVICE).manual_seed(0)
    for layer in range(config.num_hidden_layers):
        shape = (batch, config.num_key_value_heads, num_tokens, config.head_dim)
        keys, values = (
            torch.randn(shape, generator=generator, device=DEVICE, dtype=model.dtype) for _ in ("keys", "values")
        )
        if recipe is None:
            cache.update(keys, values, layer)
            continue
        statistic = STATISTICS.get(cache.recipe.policy.name)
        importance = torch.rand(batch, num_tokens, generator=generator, device=DEVICE)
        cache.own_layers[layer].append(keys, values, {statistic: importance} if statistic else None)
    return cache


def measure_all(found: dict[str, Any], arguments: argparse.Namespace) -> None:
    sizes = (4, 4096, 32) if DEVICE.type == "cuda" else (2, 256, 8)
    model = llama(*sizes, arguments.tokens, torch.bfloat16)
    token = torch.zeros(arguments.batch, dtype=torch.long, device=DEVICE)
    for name, recipe in {STOCK: None, **methods(arguments.tokens)}.items():

        def measure(name: str = name, recipe: dict[str, Any] | None = recipe) -> None:
            cache = filled(model, recipe, arguments.batch, arguments.tokens)
            if recipe is None:
                model.set_attn_implementation("sdpa")
                feed = lambda t: model(t[:, None], past_key_values=cache, logits_to_keep=1)  # noqa: E731
                held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
            else:
                feed, held = (lambda t: step(model, cache, t)), cache.resident_bytes
            row = {"method": name, "ms": milliseconds(feed, token, arguments.steps), "resident_bytes": held}
            found["rows"].append(row)
            if recipe is not None and DEVICE.type == "cuda" and "%" in name and "int8" not in name:
                replayed = ReplayedStep(model, cache)
                row["ms_replayed"] = milliseconds(replayed, token, arguments.steps)
                assert replayed.num_replayed >= arguments.steps
            print(row, flush=True)

        attempt(found, name, measure)
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()


def milliseconds(feed: Callable[[torch.Tensor], Any], token: torch.Tensor, num_steps: int) -> float:
    """Return the median of a step's wall time, the device waited for."""
    times = []
    for number in range(num_steps + 5):
        start = time.perf_counter()
        feed(token)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        if number >= 5:
            times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def shown(found: dict[str, Any]) -> str:
    """Return the Markdown table."""
    stock = next((row["ms"] for row in found["rows"] if row["method"] == STOCK), float("nan"))
    rows = []
    for row in found["rows"]:
        replayed = f"{row['ms_replayed']:.2f} | {stock / row['ms_replayed']:.1f}" if "ms_replayed" in row else " | "
        rows.append(
            f"| {row['method']} | {row['ms']:.2f} | {stock / row['ms']:.1f} | {replayed} | "
            f"{row['resident_bytes'] / 2**20:,.0f} MiB |"
        )
    return table("| cache | ms a token | × transformers' | ms replayed | × transformers' | resident |", rows)


if __name__ == "__main__":
    main()
