"""How the CPU benchmarks measure: all methods in turn, medians and quartiles, and the model they share."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peers.report import commit, machine
from transformers import LlamaConfig, LlamaForCausalLM

from pikv_core.compression.low_rank_fit import LayerFit
from pikv_core.runs import versions

KV_HEADS, GROUP, HEAD_DIM = 8, 4, 128  # those of Llama 3.1 8B
RANK = HEAD_DIM // 2

Clock = Callable[[], float]


def options(description: str | None) -> argparse.ArgumentParser:
    """Return the options of every benchmark of the set."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found")
    return parser


def begin(arguments: argparse.Namespace) -> tuple[Clock, dict[str, Any]]:
    """Return the clock, of the processor on one thread and of the wall on more, and what a result tells of the run."""
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    found = {
        "machine": machine(),
        "commit": commit(),
        "versions": versions(),
        "threads": arguments.threads,
        "clock": "processor time" if arguments.threads == 1 else "wall time",
        "rounds": arguments.rounds,
    }
    return time.process_time if arguments.threads == 1 else time.perf_counter, found


def tell(found: dict[str, Any], tables: dict[str, str], path: Path | None) -> None:
    """Print the tables, and write what they come from."""
    print(*tables.values(), sep="\n\n")
    if path is not None:
        path.write_text(json.dumps(found, indent=1), encoding="utf-8")


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


def quartiles(times: list[float]) -> dict[str, float]:
    """Return the median and the quartiles, in milliseconds."""
    first, median, third = statistics.quantiles(times, n=4)
    return {"ms": median, "ms_first_quartile": first, "ms_third_quartile": third}


def between(row: dict[str, float]) -> str:
    """Return the quartiles of a row."""
    return f"{row['ms_first_quartile']:.2f} to {row['ms_third_quartile']:.2f}"


def table(head: str, rows: list[str]) -> str:
    """Return a Markdown table."""
    return "\n".join([head, "|---" * (head.count("|") - 1) + "|", *rows])


def random_llama(num_layers: int, num_tokens: int) -> Any:
    """Return a llama of hidden 1024 in float32."""
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=1024,
        num_hidden_layers=num_layers,
        num_attention_heads=KV_HEADS * GROUP,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        intermediate_size=2816,
        max_position_embeddings=2 * num_tokens,
    )
    return LlamaForCausalLM(config).eval()


def random_fit(unrotated: bool) -> LayerFit:
    """Return random bases of half the channels."""
    key, value = torch.linalg.qr(torch.randn(2, KV_HEADS, HEAD_DIM, RANK)).Q.unbind(0)
    return LayerFit((key, key), (value, value), unrotated)
