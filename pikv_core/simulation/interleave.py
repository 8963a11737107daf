"""Put sessions that have clocks of their own on one clock.

A recorded session says when its requests follow one another, not when it met the others. That choice is the user's,
and the same sessions give several times the hit ratio or a fraction of it: the more sessions are active between two
requests of one, the more blocks push out those it will ask for again.

absolute: every clock as it is, so all sessions start at about the same time. poisson:GAP_S: sessions begin at random,
GAP_S seconds apart on average, in an order that the seed shuffles. closed-loop:N: N sessions run at any time; when one
ends, the next in order begins.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Session:
    """When the requests of a session arrive, on its own clock; those of its sub-agents among them."""

    times_s: NDArray[np.float64]  # [n], in any order
    end_s: float  # when its last request is answered

    @property
    def begin_s(self) -> float:
        return float(self.times_s.min(initial=self.end_s))


def interleave(sessions: Sequence[Session], how: str, seed: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the order of the R requests and when each arrives in ms, from 0 on and never falling; both [R].

    The order holds indices into the requests of all sessions, one session after another. Requests at the same time
    stay in that order. how: `absolute`, `poisson:GAP_S` or `closed-loop:N`; the seed matters to poisson alone.
    """
    begins_s = _begins_s(sessions, how, seed)
    if begins_s is None:
        moved = [session.times_s for session in sessions]
    else:
        moved = [session.times_s - session.begin_s + at for session, at in zip(sessions, begins_s, strict=True)]
    times_s = np.concatenate([np.zeros(0), *moved])
    order = np.argsort(times_s, kind="stable")
    return order, 1000 * (times_s[order] - times_s.min(initial=np.inf))


def _begins_s(sessions: Sequence[Session], how: str, seed: int) -> NDArray[np.float64] | None:
    """Return when each session's first request arrives, None where the clocks stay as they are."""
    kind, _, number = how.partition(":")
    assert kind in ("absolute", "poisson", "closed-loop"), how
    if kind == "absolute" or not sessions:
        return None
    return _poisson(len(sessions), float(number), seed) if kind == "poisson" else _closed_loop(sessions, int(number))


def _poisson(num_sessions: int, gap_s: float, seed: int) -> NDArray[np.float64]:
    rng = np.random.default_rng(seed)
    begins_s = np.zeros(num_sessions)
    shuffled = rng.permutation(num_sessions)
    begins_s[shuffled[1:]] = np.cumsum(rng.exponential(gap_s, num_sessions - 1))
    return begins_s


def _closed_loop(sessions: Sequence[Session], num_running: int) -> NDArray[np.float64]:
    assert num_running >= 1
    begins_s = np.zeros(len(sessions))
    ends_s = [0.0] * num_running
    for place, session in enumerate(sessions):
        begins_s[place] = ends_s[0]
        heapq.heapreplace(ends_s, ends_s[0] + session.end_s - session.begin_s)
    return begins_s
