"""A session of many turns through a prefix store: hits beside `simulate-cache`'s, time to first token beside no store.

    python benchmarks/prefix_store.py --model runs/recall-tiny-latest [--requests 120] [--policies lru,s3fifo]

The session is a log of `gen-data requests`, each of its blocks made into words that the model knows. Every request is
served for real under every policy, and without a store right before, under the first of them; one thread, processor
time. Without --model a random llama of 4 layers, 32/8 heads of 128.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from peers.report import machine
from timing import random_llama

from pikv_core.cache import PiKVCache
from pikv_core.cache.prefix.identity import identity
from pikv_core.cache.prefix.store import PrefixStore
from pikv_core.data.requests import Requests
from pikv_core.model.loading import load_model
from pikv_core.model.prefix_reuse import PrefixReuse, measure
from pikv_core.recipes import load
from pikv_core.schema import GenerateRecipe, PrefixSettings
from pikv_core.simulation.policies import REQUEST_POLICIES
from pikv_core.simulation.readers.base import Options
from pikv_core.simulation.readers.blocks import Blocks
from pikv_core.simulation.replay import replay
from pikv_core.simulation.source import Source
from pikv_core.simulation.trace import make_trace

SHARES = (0.0, 0.5, 0.8, 1.0)  # of a prompt's tokens that are hit, between which times are told


def main() -> None:
    """Serve the session under each policy, and print hits and times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--requests", type=int, default=120)
    parser.add_argument("--block-tokens", type=int, default=64)
    parser.add_argument("--codec", default="none")
    parser.add_argument("--policies", type=lambda text: text.split(","), default=policies())
    arguments = parser.parse_args()
    recipe = load(
        "generate", None, ["threads=1"], {"model": arguments.model or "llama", "cache.codec": arguments.codec}
    )
    assert isinstance(recipe, GenerateRecipe)
    torch.manual_seed(0)
    if arguments.model is None:
        model, words = random_llama(4, 4096), list(range(1024))
    else:
        loaded = load_model(arguments.model, recipe)
        model, words = loaded.model, loaded.tokenizer.convert_tokens_to_ids([f"f{number}" for number in range(256)])
    size = arguments.block_tokens
    logged, prompts = session(arguments.requests, size, words)
    of_model, measured = identity(model, recipe.cache), measure(model, recipe.cache, size)
    blocks = {block for request in logged for block in request}
    capacity = len(blocks) // 4
    lengths = [len(prompt) for prompt in prompts]
    print(f"{machine()}; {arguments.model or 'random llama'}, codec {arguments.codec}")
    print(f"{len(prompts)} prompts of {min(lengths)} to {max(lengths)} tokens, {len(blocks)} blocks of {size} tokens;")
    print(f"capacity {capacity} blocks of {measured.block_bytes:,} bytes\n")
    print("| policy | touch | hits | simulate-cache | evictions | simulate-cache |\n|---|---|---|---|---|---|")
    times: list[tuple[float, float, float]] = []
    for name, touch in ways(arguments.policies):
        settings = PrefixSettings.model_validate(
            {"bytes": f"{capacity * measured.block_bytes}B", "block_tokens": size, "policy": name, "touch": touch}
        )
        with tempfile.TemporaryDirectory() as folder:
            compares = not times
            with PrefixStore(folder, settings, of_model, lambda: measured) as store:
                for prompt in prompts:
                    cold = first_token(model, recipe, prompt)[0] if compares else 0.0
                    warm, hits = first_token(model, recipe, prompt, store)
                    times += [(hits * size / len(prompt), cold, warm)] if compares else []
                report = store.report()
            log = Blocks().read(Source(f"{folder}/requests.jsonl"), Options())
        policy = store.policy
        trace = log if policy.expires or name == "workload-aware" else make_trace(logged, size)  # whose time is real
        found = replay(trace, policy, capacity, "prefix", settings.touch)
        print(
            f"| {name} | {report.touch} | {report.block_hits} | {found.block_hits} "
            f"| {report.evictions} | {found.evictions} |"
        )
        if compares:
            first = report
    print(
        f"\n{first.policy}, of the wall: {1000 * first.load_s / len(prompts):.1f} ms a prompt to load, "
        f"{1000 * first.save_s / len(prompts):.1f} ms to store"
    )
    print("\n| share hit | prompts | first token without | with | ratio |\n|---|---|---|---|---|")
    print_times(times)


def policies() -> list[str]:
    """Return the policies that a store can run, those with lists left out."""
    made = {name: REQUEST_POLICIES[name] for name in REQUEST_POLICIES.names()}
    return [name for name, x in made.items() if not (x.knows_future or x.unbounded or hasattr(x, "listed"))]


def ways(names: Iterable[str]) -> list[tuple[str, str]]:
    return [(name, touch) for name in names for touch in ("reverse", "forward")[: 2 if name == "lru" else 1]]


def session(num_requests: int, block_tokens: int, words: list[int]) -> tuple[list[list[int]], list[list[int]]]:
    """Return each request's whole blocks, and its prompt in tokens: those of a block follow from its id."""
    made = Requests(
        num_prefixes=6, prefix_tokens=400, turn_tokens=100, output_tokens=60, block_tokens=block_tokens,
        turns_mean=5.0, max_input_tokens=1500, length_sigma=0.5,
    )  # fmt: skip
    logged, prompts = [], []
    for _, request in zip(range(num_requests), made.requests(np.random.default_rng(0))):
        tokens: list[int] = []
        for block in request["hash_ids"]:
            tokens += np.random.default_rng(block).choice(words, block_tokens).tolist()
        length = request["input_length"]
        prompts.append(tokens[:length])
        logged.append(request["hash_ids"][: length // block_tokens])
    return logged, prompts


def first_token(
    model: Any, recipe: GenerateRecipe, prompt: list[int], store: PrefixStore | None = None
) -> tuple[float, int]:
    """Return the processor time to a prompt's first token, and its hits."""
    cache = PiKVCache.for_model(model, recipe)
    ids = torch.tensor([prompt])
    started = time.process_time()
    reuse = None if store is None else PrefixReuse(store, model, cache, ids)
    with torch.no_grad():
        output = model(ids[:, cache.get_seq_length() :], past_key_values=cache, logits_to_keep=1)
        output.logits[:, -1].argmax()
    taken = time.process_time() - started
    if reuse is None:
        return taken, 0
    reuse(ids, None)
    reuse.finish(1)
    return taken, reuse.block_hits


def print_times(times: list[tuple[float, float, float]]) -> None:
    """Print medians by the share of a prompt that was hit."""
    for low, high in zip((-1.0, *SHARES), SHARES):
        part = [(cold, warm) for share, cold, warm in times if low < share <= high]
        if part:
            cold, warm = (statistics.median(column) for column in zip(*part))
            ratio = statistics.median(warm / cold for cold, warm in part)
            told = "none" if high == 0 else f"{max(low, 0):.1f} to {high:.1f}"
            print(f"| {told} | {len(part)} | {1000 * cold:.0f} ms | {1000 * warm:.0f} ms | {ratio:.2f} |")
    cold, warm = (sum(column) for column in zip(*[x[1:] for x in times]))
    print(f"| all | {len(times)} | {cold:.1f} s | {warm:.1f} s | {warm / cold:.2f} |")


if __name__ == "__main__":
    main()
