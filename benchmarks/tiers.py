"""What decoding costs where the cache is four times the device's budget, and how much of the transfers is hidden.

    python benchmarks/tiers.py [--tokens 2048] [--steps 24] [--layers 8] [--rounds 3] [--threads 1] [--folder DIR]

A random llama of hidden 1024 reads a prompt once; every cache goes on from the same state, greedily: in memory, and
over tiers with a quarter of its bytes on the device (a GPU, or ordinary memory with a limit), from host memory, from
disk, and from a CXL memory that is simulated at bandwidths chosen so that a step's transfers take about so much of what
its computation takes in memory. Then quest, in memory and from disk. All in turn in every round, medians. What
transfers take is told over what the same steps took without waiting, both in wall time, so that other work on the cores
slows both; the work that tiers add is told in processor time.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import dataclass
from typing import Any

import torch
from timing import begin, options, random_llama, table, tell

from pikv_core.cache import PiKVCache
from pikv_core.cache.snapshot import Snapshot, restore, take
from pikv_core.model.steps import feed, step

RATIOS = (0.25, 0.5, 0.75, 1.0, 2.0)  # of a step's transfers to its computation
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
QUEST = {"policy": {"name": "quest", "dense_layers": 0}, "budget": 0.1}


@dataclass(frozen=True)
class Decoded:
    """A run's tokens, milliseconds of its steps, all their seconds, and what its tiers tell, None in memory.

    cpu_ms: of the processor, a step.
    """

    tokens: list[int]
    ms: float
    cpu_ms: float
    wall_s: float
    tiers: dict[str, Any] | None


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--folder", help="of the disk tier")
    arguments = parser.parse_args()
    _, found = begin(arguments)
    found["clock"] = "wall time"
    found["device"] = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu"
    model = random_llama(arguments.layers, arguments.tokens).to(DEVICE)
    ids = torch.randint(0, model.config.vocab_size, (1, arguments.tokens)).to(DEVICE)
    folder = arguments.folder or tempfile.gettempdir()
    full, chosen = (prefilled(model, ids, recipe) for recipe in ({}, QUEST))
    held = sum(x.nbytes for slots in full.slots.values() for x in slots.codes.values())
    limit = held // 4
    disk = {"device": limit, "host": 0, "disk": folder}
    decode(model, full, {}, arguments.steps)  # warm
    memory = decode(model, full, {}, arguments.steps)
    probe = decode(model, full, {"tiers": {"device": limit}}, arguments.steps)
    moved = probe.tiers["bytes_moved"] / arguments.steps
    recipes: dict[str, tuple[Snapshot, dict[str, Any]]] = {
        "memory": (full, {}),
        "host": (full, {"tiers": {"device": limit}}),
        "disk": (full, {"tiers": disk}),
    }
    for ratio in RATIOS:
        speed = moved / (ratio * memory.ms / 1e3) / 1e9
        cxl = {"bandwidth_gb_s": speed, "latency_us": 1.0}
        recipes[f"cxl, simulated, {ratio:g}"] = (full, {"tiers": {"device": limit, "host": 0, "cxl": cxl}})
    recipes["quest in memory"] = (chosen, QUEST)
    recipes["quest, disk"] = (chosen, {**QUEST, "tiers": disk})
    runs: dict[str, list[Decoded]] = {name: [] for name in recipes}
    for _ in range(arguments.rounds):
        for name, (state, recipe) in recipes.items():
            runs[name].append(decode(model, state, recipe, arguments.steps))
    found |= {"num_tokens": arguments.tokens, "num_steps": arguments.steps, "num_layers": arguments.layers}
    found |= {"cache_bytes": held, "device_limit_bytes": limit}
    found["rows"] = [row(name, runs, arguments.steps) for name in recipes]
    tell(found, {"tiers": _table(found["rows"])}, arguments.json)


@torch.no_grad()
def prefilled(model: Any, ids: torch.Tensor, recipe: dict[str, Any]) -> Snapshot:
    """Return what a cache holds after the prompt."""
    cache = PiKVCache.for_model(model, recipe)
    feed(model, cache, ids)
    return take(cache)


@torch.no_grad()
def decode(model: Any, state: Snapshot, recipe: dict[str, Any], num_steps: int) -> Decoded:
    """Go on from a state through a cache of its own."""
    cache = PiKVCache.for_model(model, recipe)
    restore(cache, state, model.device)
    token, tokens, times, cpu_times = torch.zeros(1, dtype=torch.long, device=DEVICE), [], [], []
    for _ in range(num_steps):
        start, cpu_start = time.perf_counter(), time.process_time()
        token = step(model, cache, token).argmax(-1)
        tokens.append(int(token))  # which waits for a GPU
        times.append(1e3 * (time.perf_counter() - start))
        cpu_times.append(1e3 * (time.process_time() - cpu_start))
    medians = statistics.median(times), statistics.median(cpu_times)
    return Decoded(tokens, *medians, sum(times) / 1e3, None if cache.tiers is None else cache.tiers.report())


def row(name: str, runs: dict[str, list[Decoded]], num_steps: int) -> dict[str, Any]:
    """Return the medians of a cache's runs beside those in memory."""
    own, peer = runs[name], runs["quest in memory" if name.startswith("quest") else "memory"]
    same = all(run.tokens == other.tokens for run, other in zip(own, peer))
    told: dict[str, Any] = {"cache": name, "ms": statistics.median(run.ms for run in own), "same_tokens": same}
    told["work_over_memory"] = statistics.median(run.cpu_ms / other.cpu_ms for run, other in zip(own, peer))
    reports = [run.tiers for run in own if run.tiers is not None]
    if reports:
        for key in ("transfer_s", "waited_s", "share_hidden", "device_peak_decoding_bytes"):
            told[key] = statistics.median(report[key] for report in reports)
        told["bytes_per_token"] = reports[0]["bytes_moved"] / num_steps
        told["transfer_over_computation"] = statistics.median(
            run.tiers["transfer_s"] / (run.wall_s - run.tiers["waited_s"]) for run in own if run.tiers is not None
        )
        told["simulated"] = reports[0]["simulated"]
    return told


def _table(rows: list[dict[str, Any]]) -> str:
    head = (
        "| cache | ms a token | its work over memory's | transfers over computation | hidden | MiB brought a token | "
        "device at most, MiB | same tokens |"
    )
    lines = []
    for told in rows:
        parts = ["", "", "", ""]
        if "share_hidden" in told:
            parts = [
                f"{told['transfer_over_computation']:.2f}",
                f"{told['share_hidden']:.0%}",
                f"{told['bytes_per_token'] / 2**20:.2f}",
                f"{told['device_peak_decoding_bytes'] / 2**20:.1f}",
            ]
        same = "yes" if told["same_tokens"] else "no"
        lines.append(
            f"| {told['cache']} | {told['ms']:.1f} | {told['work_over_memory']:.2f} | {' | '.join(parts)} | {same} |"
        )
    return table(head, lines)


if __name__ == "__main__":
    main()
