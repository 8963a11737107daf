"""What a block policy has to answer; the loop in `replay.py` owns lookup, semantics, order and accounting.

A policy is one file: a frozen dataclass (its fields are its options) with `state` and three small functions
marked `@staticmethod @register_jitable`: numba compiles them into the loop; uncompiled they are its twin.
Shared pieces: `linked_lists.py` (recency and insertion orders) and `heap.py` (orders by key).
"""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

from pikv_core.simulation.trace import Trace


class RequestPolicy(Protocol):
    """Choose which resident block leaves; every block that is accessed enters.

    `access` is the index of the access in the trace; what a policy knows of it lies in an array of the state.
    """

    name: ClassVar[str]
    always_forward: ClassVar[bool]  # its blocks are touched first to last, whatever was asked for

    def state(self, trace: Trace, capacity_blocks: int) -> tuple[Any, ...]:
        """Return fresh numpy arrays; capacity_blocks is at most trace.num_blocks."""

    @staticmethod
    def touch(state: Any, block: int, access: int) -> None:
        """Take note that a resident block is accessed."""

    @staticmethod
    def admit(state: Any, block: int, access: int) -> None:
        """Take in a block; there is room."""

    @staticmethod
    def evict(state: Any, incoming: int, access: int) -> int:
        """Forget one resident block and return it; `incoming` is the block that needs the room."""
