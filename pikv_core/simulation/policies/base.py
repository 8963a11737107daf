"""What a block policy has to answer; the loops in `replay.py` own lookup, semantics, order and accounting.

A policy is one file: a frozen dataclass (its fields are its options) with `state` and three small functions
marked `@staticmethod @register_jitable`: numba compiles them into the loops; uncompiled they are its twin.
Shared pieces: `linked_lists.py` (recency and insertion orders) and `heap.py` (orders by key).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

from numba.extending import register_jitable

from pikv_core.simulation.trace import Trace


class Functions(NamedTuple):
    """A policy's functions as the loops call them."""

    touch: Callable[[Any, int, int, int], None]
    admit: Callable[[Any, int, int, int], None]
    evict: Callable[[Any, int, int, int], int]
    expire: Callable[[Any, int], int]


class RequestPolicy(ABC):
    """Choose which resident block leaves; every block that is accessed enters.

    `access` is the index of the access in the trace, `request` the index of its request; what a policy knows of them
    lies in arrays of its state. `access - starts[request]` is the block's place in its prompt.

    always_forward: its blocks are touched first to last, whatever was asked for. expires: blocks leave by themselves
    (`expire`). leaf_first: touched last to first, it never drops a block whose successor in a prompt it holds.
    knows_future: it is a bound, not a policy to run. unbounded: the capacity is ignored and nothing ever leaves.
    refits: its state is worked out from the requests so far, so that served one by one it is made anew for each.
    forget: function (state, block) that takes a resident block out because another policy chose it; None where a
    policy cannot, which then has no place in a `switch`.
    """

    name: ClassVar[str]
    always_forward: ClassVar[bool] = False
    expires: ClassVar[bool] = False
    leaf_first: ClassVar[bool] = False
    knows_future: ClassVar[bool] = False
    unbounded: ClassVar[bool] = False
    refits: ClassVar[bool] = False
    forget: ClassVar[Any] = None

    @abstractmethod
    def state(self, trace: Trace, capacity_blocks: int) -> tuple[Any, ...]:
        """Return fresh numpy arrays; capacity_blocks is from 1 to trace.num_blocks."""

    @staticmethod
    @abstractmethod
    def touch(state: Any, block: int, access: int, request: int) -> None:
        """Take note that a resident block is accessed."""

    @staticmethod
    @abstractmethod
    def admit(state: Any, block: int, access: int, request: int) -> None:
        """Take in a block; there is room."""

    @staticmethod
    @abstractmethod
    def evict(state: Any, incoming: int, access: int, request: int) -> int:
        """Forget one resident block and return it; `incoming` is the block that needs the room."""

    @staticmethod
    @register_jitable
    def expire(state: Any, request: int) -> int:
        """Forget one block whose time is over as the request arrives and return it, -1 where there is none left."""
        return -1

    def functions(self) -> Functions:
        """Return what the loops call."""
        return Functions(self.touch, self.admit, self.evict, self.expire)

    def parts(self) -> tuple[type[RequestPolicy], ...]:
        """Return the classes whose functions these are: the same parts, the same compiled loop."""
        return (type(self),)
