"""SIEVE against a list with a hand."""

from __future__ import annotations

from plain_replay import assert_replay_equals_plain

from pikv_core.simulation.policies.sieve import Sieve


class ListWithHand:
    def __init__(self, capacity: int):
        self.capacity = capacity
        self.queue: list[list[int]] = []  # block and whether it was hit, the oldest first
        self.hand = 0

    def __contains__(self, block: int) -> bool:
        return any(held == block for held, _ in self.queue)

    def hit(self, block: int) -> None:
        next(entry for entry in self.queue if entry[0] == block)[1] = 1

    def miss(self, block: int) -> bool:
        is_full = len(self.queue) == self.capacity
        if is_full:
            self.hand %= self.capacity
            while self.queue[self.hand][1]:
                self.queue[self.hand][1] = 0
                self.hand = (self.hand + 1) % self.capacity
            del self.queue[self.hand]
            # past the newest block the hand starts over, and does not wait for the block that comes now
            self.hand %= max(1, len(self.queue))
        self.queue.append([block, 0])
        return is_full


def test_equals_a_list_with_a_hand() -> None:
    assert_replay_equals_plain(Sieve(), ListWithHand)
