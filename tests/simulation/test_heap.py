"""The heap of blocks equals a search among the keys, whatever comes, changes and leaves."""

from __future__ import annotations

import random

from pikv_core.simulation import heap


def test_equals_a_search() -> None:
    for seed in range(60):
        random_ = random.Random(seed)
        capacity = random_.randrange(1, 20)
        num_blocks = capacity + random_.randrange(0, 30)
        keys, slots, places, count = made = heap.make_heap(num_blocks, capacity)
        held: dict[int, int] = {}
        for _ in range(300):
            smallest = min(held, key=held.__getitem__, default=-1)
            match random_.randrange(6):
                case 0 | 1:
                    outside = [block for block in range(num_blocks) if block not in held]
                    if outside and len(held) < capacity:
                        block = random_.choice(outside)
                        held[block] = keys[block] = 1000 * random_.randrange(-50, 50) + block  # no two alike
                        heap.push(*made, block)
                case 2 if held:
                    assert heap.pop(*made) == smallest
                    del held[smallest]
                case 3 if held:
                    block = random_.choice(sorted(held))
                    heap.remove(*made, block)
                    del held[block]
                case 4 if held:
                    heap.close(*made)
                    block = random_.choice(sorted(held))
                    change = 1000 * random_.randrange(0, 60)
                    if random_.random() < 0.5:
                        held[block] = keys[block] = held[block] + change
                        heap.sink(*made, block)
                    else:
                        held[block] = keys[block] = held[block] - change
                        heap.rise(keys, slots, places, block)
                case 5:
                    assert heap.first(*made) == smallest
            assert count[0] - count[1] == len(held)
