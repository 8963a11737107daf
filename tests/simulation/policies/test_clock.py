"""CLOCK against a circle of slots with a hand."""

from __future__ import annotations

import pytest
from plain_replay import assert_replay_equals_plain

from pikv_core.simulation.policies.clock import Clock


class Circle:
    def __init__(self, capacity: int, most: int):
        self.capacity, self.most = capacity, most
        self.slots: list[list[int]] = []  # block and references
        self.hand = 0

    def __contains__(self, block: int) -> bool:
        return any(held == block for held, _ in self.slots)

    def hit(self, block: int) -> None:
        slot = next(slot for slot in self.slots if slot[0] == block)
        slot[1] = min(self.most, slot[1] + 1)

    def miss(self, block: int) -> bool:
        if len(self.slots) < self.capacity:
            self.slots.append([block, 0])
            return False
        while self.slots[self.hand][1]:
            self.slots[self.hand][1] -= 1
            self.hand = (self.hand + 1) % self.capacity
        self.slots[self.hand] = [block, 0]
        self.hand = (self.hand + 1) % self.capacity
        return True


@pytest.mark.parametrize("bits", [1, 2])
def test_equals_a_circle(bits: int) -> None:
    assert_replay_equals_plain(Clock(bits=bits), lambda capacity: Circle(capacity, 2**bits - 1))
