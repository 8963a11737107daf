"""FIFO keeps its order where others choose victims too, in a queue that does not grow."""

from __future__ import annotations

import random

from pikv_core.simulation.policies.fifo import FIFO
from pikv_core.simulation.trace import make_trace


def test_order_equals_a_list_where_others_choose_some() -> None:
    num_blocks = 30
    for seed in range(40):
        random_ = random.Random(seed)
        capacity = random_.randrange(1, 12)
        others_choose = random_.choice((0.1, 0.5, 0.95, 1.0))
        policy, queue = FIFO(), list[int]()
        state = policy.state(make_trace([list(range(num_blocks))]), capacity)
        for access in range(400):
            block = random_.choice([block for block in range(num_blocks) if block not in queue])
            if len(queue) == capacity:
                if random_.random() < others_choose:
                    policy.forget(state, queue.pop(random_.randrange(capacity)))
                else:
                    assert policy.evict(state, block, access, access) == queue.pop(0)
            policy.admit(state, block, access, access)
            queue.append(block)
        while queue:
            assert policy.evict(state, num_blocks, 400, 400) == queue.pop(0)
