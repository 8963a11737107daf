"""Evict any resident block, each as likely as the others: the least that a policy has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from numba.extending import register_jitable
from pydantic import Field

from pikv_core.simulation.policies import REQUEST_POLICIES
from pikv_core.simulation.policies.base import RequestPolicy
from pikv_core.simulation.trace import Trace

MODULUS, MULTIPLIER = 2**31 - 1, 48271  # Park and Miller's generator: products stay below 2**47
COUNT, DRAW = 0, 1


@register_jitable
def take_out(residents: Any, places: Any, numbers: Any, place: int) -> int:
    """Take the block at `place` out of the residents, the last of whom moves there, and return it."""
    block = residents[place]
    numbers[COUNT] -= 1
    last = residents[numbers[COUNT]]
    residents[place] = last
    places[last] = place
    return block


@REQUEST_POLICIES.register("random")
@dataclass(frozen=True)
class Random(RequestPolicy):
    """The same seed, the same victims, compiled or not."""

    seed: Annotated[int, Field(ge=0)] = 0

    def state(self, trace: Trace, capacity_blocks: int) -> tuple[Any, ...]:
        """Return the residents [capacity_blocks], the place of each block there [U], and their count and the draw."""
        numbers = np.array([0, self.seed % (MODULUS - 1) + 1], np.int64)
        return np.zeros(capacity_blocks, np.int32), np.zeros(trace.num_blocks, np.int32), numbers

    @staticmethod
    @register_jitable
    def touch(state: Any, block: int, access: int, request: int) -> None:
        pass

    @staticmethod
    @register_jitable
    def admit(state: Any, block: int, access: int, request: int) -> None:
        residents, places, numbers = state
        residents[numbers[COUNT]] = block
        places[block] = numbers[COUNT]
        numbers[COUNT] += 1

    @staticmethod
    @register_jitable
    def evict(state: Any, incoming: int, access: int, request: int) -> int:
        residents, places, numbers = state
        numbers[DRAW] = numbers[DRAW] * MULTIPLIER % MODULUS
        return take_out(residents, places, numbers, numbers[DRAW] % numbers[COUNT])

    @staticmethod
    @register_jitable
    def forget(state: Any, block: int) -> None:
        residents, places, numbers = state
        take_out(residents, places, numbers, places[block])
