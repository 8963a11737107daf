"""Evict nothing: the ceiling of every policy, whatever the capacity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from numba.extending import register_jitable

from pikv_core.simulation.policies import REQUEST_POLICIES
from pikv_core.simulation.policies.base import RequestPolicy
from pikv_core.simulation.trace import Trace


@REQUEST_POLICIES.register("infinite")
@dataclass(frozen=True)
class Infinite(RequestPolicy):
    unbounded: ClassVar[bool] = True
    leaf_first: ClassVar[bool] = True  # nothing leaves

    def state(self, trace: Trace, capacity_blocks: int) -> tuple[Any, ...]:
        return ()

    @staticmethod
    @register_jitable
    def touch(state: Any, block: int, access: int, request: int) -> None:
        pass

    @staticmethod
    @register_jitable
    def admit(state: Any, block: int, access: int, request: int) -> None:
        pass

    @staticmethod
    @register_jitable
    def evict(state: Any, incoming: int, access: int, request: int) -> int:
        return -1
