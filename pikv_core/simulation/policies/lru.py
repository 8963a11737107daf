"""Evict the least recently used block; touched last to first, this is the leaf-first LRU of a prefix tree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from numba.extending import register_jitable

from pikv_core.simulation.linked_lists import make_lists, move_to_newest, pop_oldest, push_newest, unlink
from pikv_core.simulation.policies import REQUEST_POLICIES
from pikv_core.simulation.policies.base import RequestPolicy
from pikv_core.simulation.trace import Trace


@REQUEST_POLICIES.register("lru")
@dataclass(frozen=True)
class LRU(RequestPolicy):
    leaf_first: ClassVar[bool] = True

    def state(self, trace: Trace, capacity_blocks: int) -> tuple[Any, ...]:
        return (make_lists(trace.num_blocks),)

    @staticmethod
    @register_jitable
    def touch(state: Any, block: int, access: int, request: int) -> None:
        (links,) = state
        move_to_newest(links, links.shape[0] - 1, block)

    @staticmethod
    @register_jitable
    def admit(state: Any, block: int, access: int, request: int) -> None:
        (links,) = state
        push_newest(links, links.shape[0] - 1, block)

    @staticmethod
    @register_jitable
    def evict(state: Any, incoming: int, access: int, request: int) -> int:
        (links,) = state
        return pop_oldest(links, links.shape[0] - 1)

    @staticmethod
    @register_jitable
    def forget(state: Any, block: int) -> None:
        (links,) = state
        unlink(links, block)
