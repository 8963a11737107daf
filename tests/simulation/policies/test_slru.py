"""Segmented LRU against two lists."""

from __future__ import annotations

import pytest
from plain_replay import assert_replay_equals_plain

from pikv_core.simulation.policies.slru import SLRU


class TwoLists:
    def __init__(self, capacity: int, share: float):
        self.capacity, self.room = capacity, int(share * capacity)
        self.probation: list[int] = []
        self.protected: list[int] = []

    def __contains__(self, block: int) -> bool:
        return block in self.probation + self.protected

    def hit(self, block: int) -> None:
        (self.probation if block in self.probation else self.protected).remove(block)
        self.protected.append(block)
        if len(self.protected) > self.room:
            self.probation.append(self.protected.pop(0))

    def miss(self, block: int) -> bool:
        is_full = len(self.probation) + len(self.protected) == self.capacity
        if is_full:
            (self.probation or self.protected).pop(0)
        self.probation.append(block)
        return is_full


@pytest.mark.parametrize("share", [0.0, 0.5, 0.8, 1.0])
def test_equals_two_lists(share: float) -> None:
    assert_replay_equals_plain(SLRU(share), lambda capacity: TwoLists(capacity, share), num_seeds=16)
