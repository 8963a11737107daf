"""GDSF equals exact fractions over all blocks, and its keys do not overflow."""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
from timed_replay import Log, check

from pikv_core.errors import UsageError
from pikv_core.schema.simulate import SimulateRecipe
from pikv_core.simulation.policies.gdsf import GDSF
from pikv_core.simulation.trace import make_trace

BLOCK_TOKENS = 4  # of the plain logs' traces


class Plain:
    def __init__(self, attention_tokens: int | None, log: Log, capacity: int) -> None:
        self.attention_tokens = attention_tokens
        self.inflation = Fraction(0)
        self.now = 0
        self.counts: dict[int, int] = {}
        self.order: dict[int, tuple[Fraction, int]] = {}

    def touch(self, block: int, place: int, request: int) -> None:
        self.now += 1
        self.counts[block] = self.counts.get(block, 0) + 1
        cost = 1 + (Fraction(place * BLOCK_TOKENS, self.attention_tokens) if self.attention_tokens else 0)
        self.order[block] = self.inflation + self.counts[block] * cost, self.now

    admit = touch

    def evict(self, incoming: int, place: int, request: int) -> int:
        victim = min(self.order, key=self.order.__getitem__)
        self.inflation = self.order.pop(victim)[0]
        del self.counts[victim]
        return victim


@pytest.mark.parametrize("attention_tokens", [None, 1, 4, 16])
def test_equals_plain(attention_tokens: int | None) -> None:
    check(GDSF(attention_tokens), partial(Plain, attention_tokens))


@pytest.mark.parametrize("attention_tokens", [None, 10_000.0, 1.0])
def test_keys_hold_a_hundred_million_accesses(attention_tokens: float | None) -> None:
    longest, accesses = 2000, 10**8
    trace = make_trace([list(range(longest))], 512)
    many = dataclasses.replace(trace, ids=np.broadcast_to(np.int32(0), accesses))
    state = GDSF(attention_tokens).state(many, 1)
    costs, numbers = state[1], state[3]
    greatest = int(costs[-1]) * accesses
    assert (greatest << int(numbers[2])) | (accesses >> int(numbers[3])) < 2**63
    assert accesses >> int(numbers[3]) < 2 ** int(numbers[2])
    dearest = 1 + (longest - 1) * 512 / attention_tokens if attention_tokens else 1
    assert costs[-1] / costs[0] == pytest.approx(dearest, rel=2**-8)


def test_attention_tokens_are_at_least_one() -> None:
    with pytest.raises((UsageError, ValueError), match="attention_tokens"):
        SimulateRecipe(trace="-", policies=[{"name": "gdsf", "attention_tokens": 0}])
