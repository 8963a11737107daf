"""What each cache method costs in CPU time, as a ratio to transformers' own cache in the same run.

    python benchmarks/cache_cost.py [--tokens 4096] [--rounds 5]

A random llama of 4 layers, hidden 256, 8/2 heads of 32; one thread; medians over rounds of all methods in turn.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from pikv_core.cache import PiKVCache

METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "streaming-llm at .25": {"policy": "streaming-llm", "budget": 0.25},
    "h2o at .25": {"policy": "h2o", "budget": 0.25},
    "quest at .25": {"policy": "quest", "budget": 0.25},
    "int8": {"codec": "int8"},
    "h2o+int8 at .25": {"policy": "h2o", "budget": 0.25, "codec": "int8"},
}
DECODED = 20


def main() -> None:
    """Measure and print a table: ratios of prefill and of a decoded token."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=512,
        max_position_embeddings=2 * arguments.tokens,
    )
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 512, (1, arguments.tokens))
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ("transformers", *METHODS)}
    for _ in range(arguments.rounds):
        for name, seen in times.items():
            if name == "transformers":
                model.set_attn_implementation("sdpa")
                seen.append(measure(model, DynamicCache(config=config), ids))
            else:
                seen.append(measure(model, PiKVCache.from_recipe(config, METHODS[name]), ids))
    medians = {name: [statistics.median(column) for column in zip(*seen)] for name, seen in times.items()}
    peer = medians["transformers"]
    print(f"{arguments.tokens} tokens; transformers' own: {peer[0]:.0f} ms prefill, {peer[1]:.2f} ms a token")
    for name, (prefill, decode) in medians.items():
        print(f"{name:22} prefill × {prefill / peer[0]:.2f}   decode × {decode / peer[1]:.2f}")


@torch.no_grad()
def measure(model: Any, cache: Any, ids: torch.Tensor) -> tuple[float, float]:
    """Return CPU milliseconds of the prompt, and the median of a decoded token."""
    start = time.process_time()
    model(ids, past_key_values=cache, logits_to_keep=1)
    prefill = time.process_time() - start
    steps = []
    for _ in range(DECODED):
        start = time.process_time()
        model(ids[:, :1], past_key_values=cache, logits_to_keep=1)
        steps.append(time.process_time() - start)
    return 1e3 * prefill, 1e3 * statistics.median(steps)


if __name__ == "__main__":
    main()
