"""Compiled loops are kept on disk, and a changed policy is never run from a stale one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

POLICY = """
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numba.extending import register_jitable

from pikv_core.simulation.policies import REQUEST_POLICIES
from pikv_core.simulation.policies.base import RequestPolicy


@REQUEST_POLICIES.register("newest")
@dataclass(frozen=True)
class Newest(RequestPolicy):
    always_forward: ClassVar[bool] = True

    def state(self, trace, capacity_blocks):
        return np.zeros(capacity_blocks, np.int64), np.zeros(1, np.int64)

    @staticmethod
    @register_jitable
    def touch(state, block, access, request):
        pass

    @staticmethod
    @register_jitable
    def admit(state, block, access, request):
        stack, count = state
        stack[count[0]] = block
        count[0] += 1

    @staticmethod
    @register_jitable
    def evict(state, incoming, access, request):
        stack, count = state
        count[0] -= 1
        return stack[count[0]]
"""
PROGRAM = """
import sys
from pikv_core.registry import load_plugin
from pikv_core.simulation import replay
from pikv_core.simulation.policies import REQUEST_POLICIES
from pikv_core.simulation.trace import make_trace

load_plugin(sys.argv[1])
policy = REQUEST_POLICIES["newest"]()
found = replay.replay(make_trace([[0], [1], [2], [0], [1], [2]]), policy, 2)
stats = replay.loop_for(policy, "prefix", "numba").stats
print(found.block_hits, sum(stats.cache_hits.values()), sum(stats.cache_misses.values()))
"""


def run(plugin: Path, cache: Path) -> list[int]:
    """Return block hits, loads from the cache and compilations of one process."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(plugin)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "NUMBA_CACHE_DIR": str(cache)},
    )
    return [int(word) for word in done.stdout.split()]


def test_cache(tmp_path: Path) -> None:
    plugin, cache = tmp_path / "newest.py", tmp_path / "cache"
    plugin.write_text(POLICY)
    assert run(plugin, cache) == [1, 0, 1]
    assert run(plugin, cache) == [1, 1, 0]
    oldest = "first = stack[0]\n        stack[0] = stack[1]\n        return first"
    plugin.write_text(POLICY.replace("return stack[count[0]]", oldest))
    assert run(plugin, cache) == [0, 0, 1]
