"""ARC against the published algorithm, case by case, on four lists."""

from __future__ import annotations

from plain_replay import assert_replay_equals_plain

from pikv_core.simulation.policies.arc import ARC


class FourLists:
    """T1, T2, B1 and B2 of the paper's figure 4, the oldest block first."""

    def __init__(self, capacity: int):
        self.c, self.p = capacity, 0.0
        self.t1: list[int] = []
        self.t2: list[int] = []
        self.b1: list[int] = []
        self.b2: list[int] = []

    def __contains__(self, block: int) -> bool:
        return block in self.t1 + self.t2

    def hit(self, block: int) -> None:
        (self.t1 if block in self.t1 else self.t2).remove(block)
        self.t2.append(block)

    def replace(self, block: int) -> None:
        if self.t1 and (len(self.t1) > self.p or (block in self.b2 and len(self.t1) == self.p)):
            self.b1.append(self.t1.pop(0))
        else:
            self.b2.append(self.t2.pop(0))

    def miss(self, block: int) -> bool:
        num_before = len(self.t1) + len(self.t2)
        if block in self.b1:
            self.p = min(self.c, self.p + max(1, len(self.b2) / len(self.b1)))
            self.replace(block)
            self.b1.remove(block)
            self.t2.append(block)
        elif block in self.b2:
            self.p = max(0, self.p - max(1, len(self.b1) / len(self.b2)))
            self.replace(block)
            self.b2.remove(block)
            self.t2.append(block)
        else:
            self.make_room(block)
            self.t1.append(block)
        return len(self.t1) + len(self.t2) == num_before

    def make_room(self, block: int) -> None:
        once, twice = len(self.t1) + len(self.b1), len(self.t2) + len(self.b2)
        if once == self.c:
            if len(self.t1) < self.c:
                self.b1.pop(0)
                self.replace(block)
            else:
                self.t1.pop(0)
        elif once + twice >= self.c:
            if once + twice == 2 * self.c:
                self.b2.pop(0)
            self.replace(block)


def test_equals_the_published_algorithm() -> None:
    assert_replay_equals_plain(ARC(), FourLists, num_seeds=60)
