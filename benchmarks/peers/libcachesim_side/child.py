"""libCacheSim's side of the comparison, run inside its own environment and asked by peer.py.

The folder holds no module called libcachesim, so that the package itself is imported.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
import time
from typing import Any

import libcachesim as lcs


def replay(file: str, policy: str, capacity_blocks: int, options: dict[str, Any]) -> dict[str, Any]:
    """Replay an oracleGeneral file; `open_s` is the CPU time to open it, `replay_s` that of `process_trace`."""
    began = time.process_time()
    reader = lcs.TraceReader(file, lcs.TraceType.ORACLE_GENERAL_TRACE, lcs.ReaderInitParam(ignore_obj_size=True))
    cache = getattr(lcs, policy)(cache_size=capacity_blocks, **options)
    opened = time.process_time()
    miss_ratio, _ = cache.process_trace(reader)
    ended = time.process_time()
    accesses = os.path.getsize(file) // 24
    return {"hits": round((1 - miss_ratio) * accesses), "open_s": opened - began, "replay_s": ended - opened}


def main() -> None:
    """Answer every line; what the library itself prints goes to stderr."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for line in sys.stdin:
        question = json.loads(line)
        if question:
            answer = replay(**question)
        else:
            answer = {"python": platform.python_version(), "libcachesim": importlib.metadata.version("libcachesim")}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
