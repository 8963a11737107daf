"""Pin what every policy hits on data/simulation/requests.jsonl, and what the peers count on the same trace.

    python benchmarks/peers/golden.py [--policy lru,switch:lru+lfu] [--replace]

golden.json holds policy → capacity → semantics → hits, from the policies' uncompiled functions with their default
options; those of policies that are not named stay, and a number changes only with --replace. Beside it stand the
object hits of libCacheSim and the token hits that kvcache-simulator counts in the second half of the requests, where
the first half fills the cache. The trace was written by `pikv gen-data requests` with the options in manifest.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import kvcache_simulator
import libcachesim
from peer import ROOT, Peer, peer_python
from pydantic import TypeAdapter

from pikv_core.components import build
from pikv_core.files import sha256, write_json
from pikv_core.schema.base import RequestPolicySpec
from pikv_core.simulation.export import export_oracle_general
from pikv_core.simulation.load import load
from pikv_core.simulation.policies import REQUEST_POLICIES
from pikv_core.simulation.replay import Semantics, replay
from pikv_core.simulation.trace import Trace

FOLDER = ROOT / "data" / "simulation"
CAPACITIES = [40, 160, 640, 2560]  # blocks; the longest request has 32
SEMANTICS: tuple[Semantics, ...] = ("prefix", "object")


def main() -> int:
    """Write golden.json; return 1 where that would change a pinned number and --replace is not given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replace", action="store_true", help="let pinned numbers change")
    every = [name for name in REQUEST_POLICIES.names() if not hasattr(REQUEST_POLICIES[name], "listed")]
    parser.add_argument("--policy", type=lambda text: text.split(","), default=every, help="those to pin")
    arguments = parser.parse_args()
    file = FOLDER / "requests.jsonl"
    trace = load(str(file), keep_columns=False).trace
    path = FOLDER / "golden.json"
    pinned = json.loads(path.read_text(encoding="utf-8"))["hits"] if path.exists() else {}
    hits = pinned | {policy: _hits(trace, policy) for policy in arguments.policy}
    changed = [policy for policy in pinned if pinned[policy] != hits[policy]]
    if changed and not arguments.replace:
        print(f"pinned hits would change: {', '.join(changed)}; --replace lets them", file=sys.stderr)
        return 1
    found = {
        "trace": {"sha256": sha256(file), "num_requests": trace.num_requests, "num_blocks": trace.num_blocks},
        "hits": dict(sorted(hits.items())),
        "libcachesim": _libcachesim(trace),
        "kvcache-simulator": _kvcache_simulator(file),
    }
    write_json(path, found)
    return 0


def _hits(trace: Trace, spec: str) -> dict[str, dict[str, int]]:
    policy = build(REQUEST_POLICIES, TypeAdapter(RequestPolicySpec).validate_python(spec))
    return {
        str(capacity): {
            semantics: replay(trace, policy, capacity, semantics, backend="python").block_hits
            for semantics in SEMANTICS
        }
        for capacity in CAPACITIES
    }


def _libcachesim(trace: Trace) -> dict[str, Any]:
    """Return the object hits of the policies that both sides define alike, by capacity."""
    python = peer_python("libcachesim", libcachesim.PACKAGES)
    with tempfile.TemporaryDirectory() as folder, Peer(python, libcachesim.CHILD) as peer:
        file = Path(folder) / "requests.oracleGeneral"
        export_oracle_general(trace, file)
        return {
            "version": peer.ask()["libcachesim"],
            "object_hits": {
                name: {
                    str(capacity): peer.ask(
                        file=str(file), policy=libcachesim.NAMES[name], capacity_blocks=capacity, options={}
                    )["hits"]
                    for capacity in CAPACITIES
                }
                for name in libcachesim.SAME
            },
        }


def _kvcache_simulator(file: Path) -> dict[str, Any]:
    """Return the token hits of the requests after the first half, by capacity."""
    python = peer_python("kvcache-simulator", kvcache_simulator.PACKAGES)
    with Peer(python, kvcache_simulator.CHILD) as peer:
        block_tokens = kvcache_simulator.BLOCK_TOKENS
        answer = peer.ask(trace=str(file), block_tokens=block_tokens, capacities=CAPACITIES, policies=["lru", "fifo"])
        return {
            "version": peer.ask()["kvcache-simulator"],
            "warm_up_requests": answer["warm_up_requests"],
            "hit_tokens": {
                name: {str(capacity): count for capacity, count in zip(CAPACITIES, tokens) if count is not None}
                for name, tokens in answer["hit_tokens"].items()
            },
        }


if __name__ == "__main__":
    sys.exit(main())
