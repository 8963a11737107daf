"""kvcache-simulator's side of the comparison, run inside its own environment and asked by peer.py."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import resource
import sys
from typing import Any

from kvcache_sim.cpp_backend import run_cpp_sweep
from kvcache_sim.simulator import warmup_requests_for_trace
from kvcache_sim.trace import parse_trace_file


def sweep(trace: str, block_tokens: int, capacities: list[int], policies: list[str]) -> dict[str, Any]:
    """Replay every policy at every capacity with the C++ core; hits are tokens, None where the cache was not full.

    Counted are the requests after the first half, as its command line does. Times are CPU seconds.
    """
    began = _cpu_s()
    parsed = parse_trace_file(trace, block_size=block_tokens)
    warm_up = warmup_requests_for_trace(parsed, 0.5)
    read = _cpu_s()
    found = run_cpp_sweep(parsed, capacities=capacities, policies=policies, warmup_requests=warm_up)
    ended = _cpu_s()

    def hit_tokens(policy: str, capacity: int) -> int | None:
        result = found.results[policy, capacity]
        return result.hitTokens if result.measurementMode == "fixed_window" else None

    return {
        "warm_up_requests": warm_up,
        "measured_tokens": found.ceiling.totalTokens,
        "ceiling_hit_tokens": found.ceiling.hitTokens,
        "hit_tokens": {policy: [hit_tokens(policy, capacity) for capacity in capacities] for policy in policies},
        "read_s": read - began,
        "replay_s": ended - read,
    }


def _cpu_s() -> float:
    """Return the CPU time of this process and of the C++ core, which is a process of its own."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def main() -> None:
    """Answer every line."""
    for line in sys.stdin:
        question = json.loads(line)
        if question:
            answer = sweep(**question)
        else:
            version = importlib.metadata.version("kvcache-simulator")
            answer = {"python": platform.python_version(), "kvcache-simulator": version}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
