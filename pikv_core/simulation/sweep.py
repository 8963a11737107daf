"""Replay policies at capacities, several at a time on threads: compiled loops run without Python's lock."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event

from pikv_core.simulation.policies.base import RequestPolicy
from pikv_core.simulation.replay import Replay, Semantics, Touch, replay
from pikv_core.simulation.trace import Trace


def sweep(
    trace: Trace,
    pairs: Sequence[tuple[RequestPolicy, int]],
    semantics: Semantics,
    touch: Touch | None,
    threads: int = 1,
    progress: Callable[[int, float], None] | None = None,
) -> Generator[Replay]:
    """Yield the replay of each pair of policy and capacity (blocks), in order; at most `threads` wait to be taken.

    Close it to stop those under way: they end at their next report of progress. progress: called with the index of a
    pair and the share of it that is done.
    """
    stopped = Event()

    def one(index: int) -> Replay:
        def told(done: int, total: int) -> None:
            if stopped.is_set():
                raise InterruptedError
            if progress is not None:
                progress(index, done / max(1, total))

        policy, capacity = pairs[index]
        return replay(trace, policy, capacity, semantics, touch, progress=told)

    with ThreadPoolExecutor(max_workers=threads) as pool:
        waiting: deque[Future[Replay]] = deque()
        try:
            for index in range(len(pairs)):
                waiting.append(pool.submit(one, index))
                if len(waiting) > threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            stopped.set()
            pool.shutdown(wait=True, cancel_futures=True)
